"""Whether the device waits for the host: gaps in the profiler's trace of a real run.

Command: python benchmarks/overlap.py [--steps=57] [--data=synthetic/jpeg] [--workers=0]
         [--out=runs/benchmark_overlap]

`cait_jax.train.train` trains a small CaiT on made-up images: a log line every third step, a checkpoint every
fifth, an evaluation of the parameters and their average every seventh. The profiler's trace says when programs ran
on the first device. The time from the start of one step to the start of the next belongs to what the loop did in
between, and what no program covers of it is idle. The first of each kind compiles or opens something and is left
out.

On a CPU host and device share the cores, so programs are slower while the host is at work; idle time is still
time in which the device had nothing to do. Traces of other devices have not been tried.
"""

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
from ml_collections import ConfigDict
from reports import write_report

from cait_jax.data import in_memory
from cait_jax.train import train
from cait_jax.train.config import get_config

LOG_EVERY, SAVE_EVERY, EVALUATE_EVERY = 3, 5, 7
STEP, EVALUATION = "jit_train_step", "jit_eval_step"
MS = 1e6  # nanoseconds


class Execution(NamedTuple):
    """One run of a program on the device: from its first operation to its last, in nanoseconds."""

    start: float
    end: float
    program: str


def small_run(data: str, steps: int, workers: int) -> ConfigDict:
    """Steps of some 300 ms on two cores, and evaluations of four batches for each of two sets of weights."""
    config = get_config()
    config.data.name, config.data.workers = data, workers
    config.data.aug_repeats = 1
    config.steps = steps
    config.batch_size = config.eval.batch_size = 32
    config.image_size = 32
    config.model.name = "cait_xxs12_patch4_32"
    config.model.depth = 2
    config.model.stacked = False
    config.augment.rand_augment = ""
    in_memory._COUNTS["validation"] = in_memory.JPEG_COUNTS["validation"] = 128
    images = (in_memory.JPEG_COUNTS if data.endswith("jpeg") else in_memory._COUNTS)["train"]
    config.eval.every_epochs = EVALUATE_EVERY * config.batch_size / images
    config.checkpoint.every_steps, config.report.every_steps = SAVE_EVERY, LOG_EVERY
    return config


def executions(directory: Path) -> list[Execution]:
    """What the first device ran, by its start, from the trace in `directory`."""
    (path,) = directory.glob("**/*.xplane.pb")
    planes = list(jax.profiler.ProfileData.from_file(str(path)).planes)
    devices = sorted((p for p in planes if p.name.startswith("/device:")), key=lambda p: p.name)
    runs: dict[tuple[str, int], tuple[float, float]] = {}
    for line in (line for plane in devices[:1] or planes for line in plane.lines):
        for event in line.events:
            stats = dict(event.stats)
            if "hlo_module" in stats and stats.get("device_ordinal", 0) == 0:
                key = str(stats["hlo_module"]), int(stats["run_id"])
                end = event.start_ns + event.duration_ns
                first, last = runs.get(key, (event.start_ns, end))
                runs[key] = min(first, event.start_ns), max(last, end)
    return sorted(Execution(*times, program) for (program, _), times in runs.items())


def gaps(runs: list[Execution], start: float, end: float) -> Iterator[tuple[float, float]]:
    """From when to when no program ran between two moments."""
    busy_until = start
    for run in runs:
        if run.end > start and run.start < end:
            if run.start > busy_until:
                yield busy_until, run.start
            busy_until = max(busy_until, run.end)
    if busy_until < end:
        yield busy_until, end


def kind_of(step: int) -> str:
    """What the loop did after a step."""
    if step % EVALUATE_EVERY == 0:
        return "evaluation and checkpoint"
    if step % SAVE_EVERY == 0:
        return "checkpoint"
    return "log line" if step % LOG_EVERY == 0 else "nothing"


def idle_times(runs: list[Execution]) -> dict[str, list[float]]:
    """Idle milliseconds after each step, by what the loop did; evaluations in their parts too."""
    starts = [run.start for run in runs if run.program == STEP]
    seen: set[str] = set()
    idle: dict[str, list[float]] = {}
    for step, (start, end) in enumerate(itertools.pairwise(starts), 1):
        kind = kind_of(step)
        if kind not in seen:
            seen.add(kind)
            continue
        parts = {kind: (start, end)}
        evaluation = [r for r in runs if r.program == EVALUATION and start <= r.start < end]
        if evaluation:
            parts["  before it"] = start, evaluation[0].start
            parts["  in it"] = evaluation[0].start, evaluation[-1].end
            parts["  after it"] = evaluation[-1].end, end
        for name, part in parts.items():
            idle.setdefault(name, []).append(sum(b - a for a, b in gaps(runs, *part)) / MS)
    return idle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=57, help="steps of the run, 22 or more")
    parser.add_argument("--data", default="synthetic", choices=in_memory.NAMES)
    parser.add_argument("--workers", type=int, default=0, help="processes that decode JPEGs")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_overlap"))
    args = parser.parse_args()
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    config = small_run(args.data, args.steps, args.workers)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(out / "trace"), profiler_options=options):
        train(config, out / "run")

    runs = executions(out / "trace")
    idle = idle_times(runs)
    usual = statistics.median(r.end - r.start for r in runs if r.program == STEP) / MS
    print(f"\n{args.data}: a step takes {usual:.0f} ms (median)")
    print(f"{'idle ms after a step, by what follows':38} {'times':>5} {'median':>8} {'most':>8}")
    for name in ("nothing", "log line", "checkpoint", "evaluation and checkpoint"):
        parts = [n for n in idle if n.startswith("  ")] if name.startswith("eval") else []
        for row in (name, *parts):
            ms = idle[row]
            print(f"{row:38} {len(ms):5} {statistics.median(ms):8.2f} {max(ms):8.2f}")
    write_report(
        out / "overlap.json",
        data=args.data,
        workers=args.workers,
        steps=args.steps,
        step_ms=usual,
        idle_ms=idle,
    )


if __name__ == "__main__":
    main()
