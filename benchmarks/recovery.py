"""What recovery costs a step: the check for numbers that are not finite, and the host's work on phases and lock.

Command: python benchmarks/recovery.py --data_dir=DIR [--rounds=150] [--steps=1] [--out=runs/benchmark_recovery]

Both sides are the compiled step of `cifar10.py:small` (TFDS `cifar10` under DIR) on one batch: one as it is, one
whose update is unconditional. Rounds alternate, and so does the order within a round; the ratio is the median of
those of the rounds. The host's work of one step (a watchdog's phases in one of two processes, the lock's check) is
timed alone, and given as a share of the step.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
from reports import write_report

from cait_jax.files import DirectoryLock
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train.setup import Trainer, build
from cait_jax.train.watchdog import Watchdog
from configs import cifar10

HOST_STEPS = 20_000


def make_side(trainer: Trainer) -> Callable[[int], float]:
    """A function that gives the seconds of so many steps of a trainer."""
    state: Any = trainer.init_state()
    batch = put_batch(next(trainer.train_batches()), batch_sharding(trainer.mesh))

    def run(steps: int) -> float:
        nonlocal state
        began = time.perf_counter()
        for _ in range(steps):
            state, metrics = trainer.train_step(state, batch)
        jax.block_until_ready((state, metrics))
        return time.perf_counter() - began

    run(2)
    return run


def seconds_on_host(trainer: Trainer) -> float:
    """Of one step: its phases in one of two processes, without the thread that reports them; the lock's check."""
    watchdog = Watchdog(trainer.config.watchdog, mock.Mock(), index=0, count=2)
    with tempfile.TemporaryDirectory() as workdir, DirectoryLock(Path(workdir)) as lock:
        began = time.perf_counter()
        for step in range(HOST_STEPS):
            watchdog.enter("data", step)
            watchdog.enter("step", step)
            lock.check()
        return (time.perf_counter() - began) / HOST_STEPS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--steps", type=int, default=1, help="of a round")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_recovery"))
    args = parser.parse_args()
    config = cifar10.get_config("small")
    config.data.data_dir = args.data_dir
    guarded = make_side(build(config))
    with mock.patch("jax.lax.cond", lambda predicate, update, keep: update()):
        plain = make_side(build(config))
    seconds: dict[str, list[float]] = {"guarded": [], "unconditional": []}
    for i in range(args.rounds):
        sides = [("guarded", guarded), ("unconditional", plain)]
        for name, side in sides[:: 1 if i % 2 else -1]:
            seconds[name].append(side(args.steps) / args.steps)
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    step = statistics.median(seconds["guarded"])
    host = seconds_on_host(build(config))
    for name, times in seconds.items():
        print(f"{name:14} {1e3 * statistics.median(times):8.2f} ms a step")
    print(
        f"ratio          {statistics.median(ratios):8.4f}  (quartiles {quartiles[0]:.4f} to {quartiles[2]:.4f})"
    )
    print(f"host           {1e6 * host:8.2f} us a step, {host / step:.4%}")
    write_report(
        args.out / "recovery.json",
        seconds=seconds,
        host_seconds=host,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
