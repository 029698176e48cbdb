"""How long a save holds up training, and how long until it is committed, against a plain file of as many bytes.

Command: python benchmarks/save.py [--megabytes=48] [--rounds=9] [--out=runs/benchmark_save]

The state is arrays as a training's has them (many small ones, a few large), on the default device. "blocks" is the
time in which `Checkpoints.save` has not returned; training may go on after it. "committed" is the time until every
file is synced and the manifest is in place. "file" is the time to write and sync one file: what the
disk can do. The save before is committed when the next begins, as between checkpoints of a training.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from reports import write_report
from tabulate import tabulate

from cait_jax.checkpoint.store import Checkpoints

LEAVES = 4 * 240  # parameters, their average and two moments of a network of 24 blocks


def make_state(megabytes: float) -> dict[str, jax.Array]:
    """Arrays of float32: of each ten, one has almost all bytes."""
    values = int(megabytes * 1e6 / 4)
    large, small = values // (LEAVES // 10), 192
    keys = jax.random.split(jax.random.key(0), LEAVES)
    return {
        f"leaf{i}": jax.random.normal(key, (small if i % 10 else large - 9 * small,))
        for i, key in enumerate(keys)
    }


def plain(folder: Path, size: int) -> float:
    """Seconds to write and sync a file."""
    data = np.random.default_rng(0).bytes(size)
    began = time.perf_counter()
    with (folder / "file").open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=float, default=48.0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_save"))
    args = parser.parse_args()
    state = make_state(args.megabytes)
    size = sum(leaf.nbytes for leaf in state.values())
    advance = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state))
    seconds: dict[str, list[float]] = {"blocks": [], "committed": [], "file": []}
    args.out.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(dir=args.out) as folder,
        Checkpoints(Path(folder) / "checkpoints") as checkpoints,
    ):
        for step in range(args.rounds + 1):
            state = jax.block_until_ready(advance(state))
            began = time.perf_counter()
            checkpoints.save(step, state, {"step": step})
            blocked = time.perf_counter() - began
            checkpoints.wait()
            if step:  # the first opens Orbax
                seconds["blocks"].append(blocked)
                seconds["committed"].append(time.perf_counter() - began)
                seconds["file"].append(plain(Path(folder), size))
        restored = checkpoints.restore(state)
        assert restored is not None
        same = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b)), restored[1], state)
        assert all(same.values())
    table = [
        [name, 1e3 * statistics.median(found), 1e3 * min(found), 1e3 * max(found)]
        for name, found in seconds.items()
    ]
    print(f"{size / 1e6:.1f} MB in {len(state)} arrays")
    print(tabulate(table, ["", "median ms", "least", "most"], floatfmt=".1f"))
    ratio = statistics.median(seconds["committed"]) / statistics.median(seconds["file"])
    print(f"\nratio {ratio:.2f} (committed over file)")
    write_report(
        args.out / "save.json",
        bytes=size,
        arrays=len(state),
        seconds=seconds,
        ratio=ratio,
    )


if __name__ == "__main__":
    main()
