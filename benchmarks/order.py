"""What the order of an epoch costs by the size of the split: time to the first training batch, and memory.

Command: python benchmarks/order.py [--examples 1000000 10000000 100000000 1000000000] [--listed-until=100000000]
         [--rounds=3] [--out=runs/benchmark_order]

Every measurement is a new process that takes one batch of 64 from `train_batches`, without workers, of a split of
the given length whose examples are one small JPEG; a batch of a short split comes first, for the imports. "start"
is the first batch of training, "resumed" that of a step in the middle of the third epoch. "listed" sorts a word
for each example, as splits of up to `LISTED` examples are ordered, "shuffled" is Grain's index shuffle. Seconds
are medians of the rounds; memory is the largest peak of the resident set over what it was before. A list of 10^9
takes about 20 GB in each of the threads that make it.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from reports import write_report
from tabulate import tabulate

BATCH, SIZE = 64, (32, 32)


class Records:
    """The same encoded image `count` times."""

    def __init__(self, count: int, image: bytes) -> None:
        self.count, self.image = count, image

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": self.image, "label": index}


def resident(field: str) -> float:
    """A value of this process's memory from Linux, in MB."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) / 1e3


def measure(count: int, order: str, at: str) -> dict[str, float]:
    """Seconds to the first batch and MB that are added for it, in this process."""
    import cv2
    import numpy as np

    from cait_jax.data import Encoded, sampler, train_batches

    noise = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), np.uint8)
    image = cv2.imencode(".jpg", noise)[1].tobytes()

    def first(count: int, step: int) -> None:
        split = Encoded(Records(count, image), ("one",), 3)
        options: dict[str, Any] = {"batch_size": BATCH, "image_size": SIZE, "start_step": step}
        with train_batches(split, seed=0, **options) as batches:
            next(batches)

    first(BATCH, 0)
    sampler.LISTED = 0 if order == "shuffled" else sys.maxsize
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, began = resident("VmRSS"), time.perf_counter()
    first(count, 0 if at == "start" else 5 * count // (2 * BATCH))
    return {"seconds": time.perf_counter() - began, "mb": resident("VmHWM") - before}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--examples", type=int, nargs="+", default=[10**power for power in range(6, 10)]
    )
    parser.add_argument("--listed-until", type=int, default=10**8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_order"))
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(int(args.one[0]), *args.one[1:])))
        return
    rows, measured = [], []
    for count in args.examples:
        for order in ("listed", "shuffled"):
            if order == "listed" and count > args.listed_until:
                continue
            row: dict[str, Any] = {"examples": f"{count:,}", "order": order}
            for at in ("start", "resumed"):
                command = [sys.executable, __file__, "--one", str(count), order, at]
                found = [
                    json.loads(
                        subprocess.run(command, capture_output=True, text=True, check=True).stdout
                    )
                    for _ in range(args.rounds)
                ]
                row[f"{at} (s)"] = f"{statistics.median(each['seconds'] for each in found):.2f}"
                row[f"{at} (MB)"] = f"{max(each['mb'] for each in found):,.0f}"
                measured.append({"examples": count, "order": order, "at": at, "rounds": found})
            rows.append(row)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    write_report(args.out / "order.json", batch=BATCH, measured=measured)


if __name__ == "__main__":
    main()
