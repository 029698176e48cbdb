"""What the loop costs: 500 training steps of the digits through it, against the bare compiled step.

Command: python benchmarks/loop.py [--rounds=5] [--steps=500] [--inspect_every=100] [--out=runs/benchmark_loop]

One side is `cait_jax.train.loop`'s own loop (batches, transfer, metrics read, bar or lines, metrics.jsonl), from
the moment the first step has finished to the last, without evaluation and checkpoint, which are not steps.
The other calls the same compiled step as often on one batch that is on the device. A third is the loop
with `report.inspect_every`. Rounds alternate; ratios are those of medians.
"""

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat
from unittest import mock

import jax
from ml_collections import ConfigDict
from reports import write_report

from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train import loop, train
from cait_jax.train.metrics import MetricWriter
from cait_jax.train.setup import Trainer, build
from configs import digits


def bare(trainer: Trainer, steps: int) -> float:
    """Seconds of `steps` calls of the compiled step."""
    state = trainer.init_state()
    batch = put_batch(next(trainer.train_batches()), batch_sharding(trainer.mesh))
    state, metrics = trainer.train_step(state, batch)
    jax.block_until_ready(metrics)
    start = time.perf_counter()
    for _ in range(steps):
        state, metrics = trainer.train_step(state, batch)
    jax.block_until_ready((state, metrics))
    return time.perf_counter() - start


def through_the_loop(config: ConfigDict, workdir: Path, steps: int) -> float:
    """Seconds of `steps` steps of `train`."""
    times: list[float] = []

    class Clock(MetricWriter):
        def progress(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
            super().progress(step, values)
            times.append(time.perf_counter())

    with mock.patch.object(loop, "MetricWriter", Clock):
        train(config, workdir)
    return times[steps] - times[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=500, help="steps of one measurement")
    parser.add_argument("--inspect_every", type=int, default=100, help="steps between records")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_loop"))
    args = parser.parse_args()
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    config = digits.get_config()
    # Two steps more: the first compiles, and the last is followed by the evaluation.
    config.steps = args.steps + 2
    config.eval.every_epochs = 1e9
    config.checkpoint.every_steps = 10**9
    trainer = build(config)
    bare(trainer, args.steps)
    recording = config.copy_and_resolve_references()
    recording.report.inspect_every = args.inspect_every
    sides: dict[str, list[float]] = {"bare step": [], "loop": [], "recording": []}
    for i in range(args.rounds):
        sides["bare step"].append(bare(trainer, args.steps))
        sides["loop"].append(through_the_loop(config, out / f"loop{i}", args.steps))
        sides["recording"].append(through_the_loop(recording, out / f"recording{i}", args.steps))

    medians = {name: statistics.median(times) for name, times in sides.items()}
    ratio = medians["loop"] / medians["bare step"]
    recorded = medians["recording"] / medians["loop"]
    print(f"{'':10} {'median s':>9}  all")
    for name, times in sides.items():
        print(f"{name:10} {medians[name]:9.3f}  {' '.join(f'{t:.3f}' for t in times)}")
    print(f"ratio      {ratio:9.4f}  of {args.steps} steps of {config.batch_size} images")
    print(f"records    {recorded:9.4f}  of the loop, one every {args.inspect_every} steps")
    write_report(
        out / "loop.json",
        seconds=sides,
        ratio=ratio,
        records_ratio=recorded,
    )


if __name__ == "__main__":
    main()
