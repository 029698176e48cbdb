"""What masked autoencoding saves by encoding visible patches alone: its step against one that encodes all patches.

Command: python benchmarks/mae.py [--config=configs/mae.py:small] [--rounds=7] [--steps=5]
         [--out=runs/benchmark_mae]

Both sides are the recipe's own training step, compiled, on a batch of made-up images that is on the device. The
encoder of the other side also computes the masked patches, whose tokens are dropped before the decoder. Rounds
alternate; the ratio is that of medians.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from flax import struct
from ml_collections import ConfigDict
from reports import write_report

from cait_jax.models.inspect import macs_of
from cait_jax.plan.compile import trace
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train.config import load_config
from cait_jax.train.objectives import mae
from cait_jax.train.objectives.patches import ranks
from cait_jax.train.setup import Trainer, build


@struct.dataclass
class EncodesAll(mae.Mae):
    """`Mae` whose encoder computes masked patches too."""

    def predict(self, params: Any, images: Any, order: Any, **options: Any) -> Any:
        encoder, decoder = {"params": params["encoder"]}, {"params": params["decoder"]}
        tokens = self.model.apply(encoder, images, visible=order, **options)
        return self.decoder.apply(decoder, tokens[:, : self.kept], ranks(order))


def encodes_all(config: ConfigDict, split: Any) -> EncodesAll:
    return EncodesAll(**vars(mae.from_config(config, split)))


class Side:
    """A compiled step with its state and batch."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.state = trainer, trainer.init_state()
        self.batch = put_batch(next(trainer.train_batches()), batch_sharding(trainer.mesh))
        self.operations = 2 * macs_of(trace(trainer).jaxpr.jaxpr)
        self.seconds_of(1)  # compiles
        self.times: list[float] = []

    def seconds_of(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.trainer.train_step(self.state, self.batch)
        jax.block_until_ready((self.state, metrics))
        return (time.perf_counter() - start) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/mae.py:small", help="a recipe of mae.py")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=5, help="steps of one measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_mae"))
    args = parser.parse_args()
    config = load_config(args.config)
    config.data.name, config.data.eval_split = "synthetic", "validation"
    sides = {"visible": Side(build(config)), "all": Side(build(config, make_objective=encodes_all))}
    for _ in range(args.rounds):
        for side in sides.values():
            side.times.append(side.seconds_of(args.steps))

    medians = {name: statistics.median(side.times) for name, side in sides.items()}
    ratio = medians["all"] / medians["visible"]
    operations = sides["all"].operations / sides["visible"].operations
    print(f"{'encoded':8} {'median s':>9}  all")
    for name, side in sides.items():
        print(f"{name:8} {medians[name]:9.4f}  {' '.join(f'{t:.4f}' for t in side.times)}")
    print(f"ratio    {ratio:9.3f}  in time; {operations:.3f} in operations")
    write_report(
        args.out / "mae.json",
        config=args.config,
        seconds={name: side.times for name, side in sides.items()},
        ratio=ratio,
        operations_ratio=operations,
    )


if __name__ == "__main__":
    main()
