"""What the memory allocator costs training on CPUs: glibc's defaults against its settings and other allocators.

Command: python benchmarks/allocator.py [--config=configs/cifar10.py:small] [--preload=LIBRARY ...] [--rounds=3]
                                        [--steps=60] [--out=runs/benchmark_allocator] [-- --config.KEY=VALUE ...]

XLA allocates a step's temporary buffers and frees them in every step. glibc serves large blocks by mmap and unmaps
them when they are freed, so each step faults its pages in again, 4 KiB at a time. The sides differ in environment
variables alone:

    glibc       its defaults: any MALLOC_ variable keeps `cait_jax.allocator` away
    default     none, so that `cait_jax.allocator` has glibc return nothing to the system
    huge pages  GLIBC_TUNABLES: transparent huge pages, where the system allows them on request
    both        the two together, by GLIBC_TUNABLES
    LIBRARY     LD_PRELOAD; jemalloc keeps freed memory and requests huge pages, by MALLOC_CONF

Each measurement is `python train.py` on synthetic images, each core a device of the mesh: the median time of a
step over the second half of the run. Rounds alternate.
"""

import argparse
import itertools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from reports import write_report
from tabulate import tabulate

from cait_jax.train.metrics import read_metrics

TRAIN = Path(__file__).parents[1] / "train.py"
HEAP = "glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=2147483647:glibc.malloc.arena_max=1"
PAGES = "glibc.malloc.hugetlb=1"
SIDES = {
    "glibc": {"MALLOC_TOP_PAD_": "131072"},
    "default": {},
    "huge pages": {"GLIBC_TUNABLES": PAGES},
    "both": {"GLIBC_TUNABLES": f"{PAGES}:{HEAP}"},
}
JEMALLOC = "thp:always,metadata_thp:always,dirty_decay_ms:-1,muzzy_decay_ms:-1,oversize_threshold:0"
EVERY = 5  # steps between lines of metrics.jsonl
_OWN = ("GLIBC_TUNABLES", "LD_PRELOAD", "MALLOC_CONF", "MALLOC_TOP_PAD_")


def measure(
    config: str, steps: int, options: list[str], variables: dict[str, str]
) -> dict[str, float]:
    """Trains in a process of its own.

    Returns:
      Seconds a `step`; thousands of page `faults` and `peak_mb`, resident, of the whole run.
    """
    cores = os.cpu_count() or 1
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={cores}"
    environment = {key: value for key, value in os.environ.items() if key not in _OWN}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, **variables}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(TRAIN), f"--config={config}", f"--workdir={folder}/run"]
        command += ["--config.data.name=synthetic", "--config.data.eval_split=validation"]
        command += [f"--config.steps={steps}", *options]
        command += [f"--config.report.every_steps={EVERY}", "--config.eval.every_epochs=1e9"]
        with Path(folder, "log").open("w") as log:
            process = subprocess.Popen(command, stderr=log, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            sys.exit(f"allocator.py: train.py failed:\n{Path(folder, 'log').read_text()}")
        rows = read_metrics(Path(folder, "run/metrics.jsonl"))
    times = [row["time"] for row in rows if "train/loss" in row]
    seconds = (after - before for before, after in itertools.pairwise(times[len(times) // 2 :]))
    return {
        "step": statistics.median(seconds) / EVERY,
        "faults": usage.ru_minflt / 1e3,
        "peak_mb": usage.ru_maxrss / 1e3,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", default="configs/cifar10.py:small", help="a recipe")
    parser.add_argument("--preload", nargs="*", default=[], help="shared libraries of allocators")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each side")
    parser.add_argument("--steps", type=int, default=60, help="of a measurement")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_allocator"))
    parser.add_argument("options", nargs="*", help="for train.py")
    args = parser.parse_args()
    if missing := [library for library in args.preload if not Path(library).is_file()]:
        parser.error(f"--preload: no file {missing[0]}")
    sides = dict(SIDES)
    for library in args.preload:
        name = re.sub(r"\.so.*$", "", Path(library).name)
        jemalloc = {"MALLOC_CONF": JEMALLOC} if "jemalloc" in name else {}
        sides[name] = {"LD_PRELOAD": library, **jemalloc}

    found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    for _ in range(args.rounds):
        for side, variables in sides.items():
            found[side].append(measure(args.config, args.steps, args.options, variables))
    medians = {
        side: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for side, runs in found.items()
    }
    ratios = {side: medians["glibc"]["step"] / row["step"] for side, row in medians.items()}
    table = [
        [side, 1e3 * row["step"], ratios[side], row["faults"], row["peak_mb"],
         " ".join(f"{1e3 * run['step']:.0f}" for run in found[side])]
        for side, row in medians.items()
    ]  # fmt: skip
    titles = ["", "step ms", "ratio", "page faults (1,000)", "peak MB", "all ms"]
    print(tabulate(table, titles, floatfmt=("", ".0f", ".2f", ".0f", ".0f")))
    write_report(
        args.out / "allocator.json",
        libc=" ".join(platform.libc_ver()),
        config=args.config,
        options=args.options,
        runs=found,
        ratios=ratios,
    )


if __name__ == "__main__":
    main()
