"""What adapters of low rank save: a training step of head, adapters and all, by `cait finetune`'s settings.

Command: python benchmarks/lora.py PHOTOGRAPHS --model=DIR [--image-size=112] [--batch-size=16] [--rank=8]
         [--rounds=5] [--out=runs/benchmark_lora]

PHOTOGRAPHS is a folder of images, one folder a class. Each step is compiled and run on a batch that is on the
device; rounds alternate. Memory is what XLA says of the compiled step: its temporaries, beside state and batch.
Time is that of the process on all cores, which other work on the machine changes less than the clock's.

Prints a table and writes OUT/lora.json.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from reports import write_report
from tabulate import tabulate

from cait_jax.plan.compile import trace
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train.finetune import folder_config
from cait_jax.train.setup import build

WAYS = ("head", "lora", "all")


def megabytes(tree: Any) -> float:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e6


class Side:
    """A compiled step with its state and batch."""

    def __init__(self, config: ConfigDict):
        trainer = build(config)
        self.objective, self.state = trainer.objective, trainer.init_state()
        with trainer.train_batches() as batches:
            self.batch = put_batch(next(batches), batch_sharding(trainer.mesh))
        self.step = trace(trainer).lower().compile()
        self.temporaries = self.step.memory_analysis().temp_size_in_bytes / 1e6
        self.learnt = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))
        if config.optimizer.train == "head":
            self.learnt = sum(leaf.size for leaf in jax.tree.leaves(self.state.params["head"]))
        self.times: list[float] = []

    def measure(self) -> None:
        start = time.process_time()
        self.state, metrics = self.step(self.state, self.batch, self.objective)
        jax.block_until_ready((self.state, metrics))
        self.times.append(time.process_time() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs")
    parser.add_argument("--model", required=True, help="a saved model or a name of `cait models`")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way that are timed")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_lora"))
    args = parser.parse_args()
    sides = {}
    for way in WAYS:
        config = folder_config(
            args.photographs, args.model, what=way, image_size=args.image_size,
            batch_size=args.batch_size, rank=args.rank if way == "lora" else None,
            devices=jax.device_count(),
        )  # fmt: skip
        sides[way] = Side(config)
    for _ in range(args.rounds + 1):  # the first warms up
        for side in sides.values():
            side.measure()
    rows = [
        {
            "what": way,
            "learnt": f"{side.learnt:,}",
            "optimizer (MB)": f"{megabytes(side.state.opt_state):.1f}",
            "temporaries of a step (MB)": f"{side.temporaries:,.0f}",
            "CPU ms an image": f"{1e3 * statistics.median(side.times[1:]) / args.batch_size:.1f}",
        }
        for way, side in sides.items()
    ]
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    write_report(
        args.out / "lora.json", rows=rows, seconds={way: side.times for way, side in sides.items()}
    )


if __name__ == "__main__":
    main()
