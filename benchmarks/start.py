"""Seconds from the command to the end of the first training step, without and with JAX's compilation cache.

Command: python benchmarks/start.py [--config=configs/digits.py] [--rounds=3] [--resume]
         [--out=runs/benchmark_start] [-- --config.KEY=VALUE ...]

Each measurement is `python train.py --config=...` in a new process and a new workdir, with a line of
`metrics.jsonl` for every step. Such a line carries the time at which it was written; the process is killed when
the first is there. "set up" is the first line on standard error, which names model and data: what is imported,
loaded and initialised until then. The step comes after it: traced, compiled or read from the cache, and run.

The cache is a new directory that one more run fills first, with every program however small
(JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0, JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1). Rounds alternate.

With --resume the workdir is that of a run which was killed after its first checkpoint: each measurement restores
and verifies it, and ends with the first step after it.
"""

import argparse
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from reports import write_report
from tabulate import tabulate

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train.metrics import read_metrics

TRAIN = Path(__file__).parents[1] / "train.py"
LIMIT = 900  # seconds that a start may take
# Of train.py's first line, which follows what libraries may say.
SET_UP = re.compile(r"parameters\) on .* steps \d+ to ")


def killed(folder: Path, config: str, options: list[str]) -> Path:
    """The workdir of a run that was killed after its first checkpoint."""
    workdir, log = folder / "killed", folder / "log"
    command = [sys.executable, str(TRAIN), f"--config={config}", f"--workdir={workdir}", *options]
    command += ["--config.report.every_steps=1", "--config.checkpoint.every_steps=1"]
    with log.open("w") as stream:
        process = subprocess.Popen(command, stderr=stream)
    began = time.time()
    while Checkpoints(workdir / "checkpoints").latest_step() is None:
        if process.poll() is not None or time.time() - began > LIMIT:
            sys.exit(f"start.py: train.py saved nothing:\n{log.read_text()}")
        time.sleep(0.01)
    process.kill()
    process.wait()
    return workdir


def start(
    config: str, options: list[str], cache: Path | None, resumed: Path | None
) -> dict[str, float]:
    """Starts a run and ends it after its first step.

    Args:
      config: the recipe.
      options: for train.py.
      cache: the compilation cache's directory; None for no cache.
      resumed: a workdir to resume from a copy of.

    Returns:
      Seconds from the command to when the run was `set_up`, and to its first `step`.
    """
    environment = dict(os.environ)
    if cache is None:
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    else:
        environment |= {
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
    with tempfile.TemporaryDirectory() as folder:
        workdir, log = Path(folder) / "run", Path(folder) / "log"
        before = -1
        if resumed is not None:
            shutil.copytree(resumed, workdir)
            before = Checkpoints(workdir / "checkpoints").latest_step() or 0
        command = [sys.executable, str(TRAIN), f"--config={config}", f"--workdir={workdir}"]
        command += ["--config.report.every_steps=1", *options]
        with log.open("w") as stream:
            began = time.time()
            process = subprocess.Popen(command, stderr=stream, env=environment)
        set_up: float | None = None
        lines: list[dict[str, Any]] = []
        try:
            while not lines:
                if process.poll() is not None or time.time() - began > LIMIT:
                    sys.exit(f"start.py: train.py took no step:\n{log.read_text()}")
                time.sleep(0.01)
                if set_up is None and SET_UP.search(log.read_text()):
                    set_up = time.time() - began
                rows = read_metrics(workdir / "metrics.jsonl")
                lines = [row for row in rows if row["step"] > before and row["time"] > began]
        finally:
            process.kill()
            process.wait()
    step = lines[0]["time"] - began
    return {"set_up": step if set_up is None else set_up, "step": step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/digits.py", help="a recipe")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--resume", action="store_true", help="from a checkpoint")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_start"))
    parser.add_argument("options", nargs="*", help="for train.py")
    args = parser.parse_args()
    sides: dict[str, list[dict[str, float]]] = {"no cache": [], "cache": []}
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder) / "cache"
        resumed = killed(Path(folder), args.config, args.options) if args.resume else None
        filling = start(args.config, args.options, cache, resumed)
        for _ in range(args.rounds):
            sides["no cache"].append(start(args.config, args.options, None, resumed))
            sides["cache"].append(start(args.config, args.options, cache, resumed))
        entries = [path.stat().st_size for path in cache.rglob("*") if path.is_file()]

    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in ("set_up", "step")}
        for side, runs in sides.items()
    }
    table = [
        [side, row["set_up"], row["step"], " ".join(f"{run['step']:.2f}" for run in sides[side])]
        for side, row in medians.items()
    ]
    table.append(["filling the cache", filling["set_up"], filling["step"], "once"])
    print(tabulate(table, ["", "set up s", "first step s", "all"], floatfmt=".2f"))
    ratio = medians["cache"]["step"] / medians["no cache"]["step"]
    print(f"\nratio {ratio:.3f}; the cache has {len(entries)} files, {sum(entries) / 1e6:.1f} MB")
    write_report(
        args.out / "start.json",
        config=args.config,
        options=args.options,
        resume=args.resume,
        seconds=sides,
        filling=filling,
        medians=medians,
        ratio=ratio,
        cache_bytes=sum(entries),
    )


if __name__ == "__main__":
    main()
