"""Faults, injected into real training runs at random moments, and what holds after each.

Command: python benchmarks/faults.py --fault=NAME --trials=N [--kind=KIND] [--out=OUT] [--seed=0] [--report]

A trial disturbs a small training on the digits (16 steps, a checkpoint every third, an evaluation every fifth),
and compares what is left with a run of the same config that nothing disturbed. `--fault=` is one of these:

    kill        kill -9, of one process or of one of two, at any moment
    power_cut   the ext4 image under the run is copied at any moment, and mounted
    unsynced    the same, but os.fsync does nothing: a trial that holds is then blind
    damage      a file of a checkpoint is changed, lost, swapped, or another run's
    disk        the storage is full, over quota, read-only or raises, for a while or for good
    processes   one of two processes is killed, stopped, hangs, raises, exits, or is never started
    signals     SIGTERM, SIGINT, SIGUSR1 to one process, to all, to the group
    nonfinite   batch, loss, gradient, parameters or metrics are not finite, on 1 and on 8 devices
    resume      the run goes on with another mesh, number of processes or of workers
    two_starts  two runs are given one workdir

Each trial is a line of OUT/NAME.jsonl (OUT: runs/faults): what was injected, what was observed, the problems, and
`held`, which is true if there are none and no process, temporary file or shared memory was left behind. The same
command goes on with the trials that have none. `--kind` takes one kind of what happens to `processes`, which is
drawn otherwise ("hung in save"). What a trial that did not hold has left stays in OUT/NAME/TRIAL. `--report` gives
a table. power_cut, unsynced and disk mount file systems, which needs root; disk compiles a C library. Linux only.
"""

import argparse
import functools
import json
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
# What must hold.
FAULTS = {
    "kill": "what is restored, and at the end state, EMA, optimiser and every logged loss are those of a run "
    "never killed, to the bit",
    "power_cut": "no step that was reported saved is lost or unreadable; the run ends with the same bits",
    "unsynced": "nothing: the control of power_cut",
    "damage": "found and named; the newest sound step is used, to the bit",
    "disk": "training goes on where it can; earlier checkpoints stay good; the exit status tells; the same bits",
    "processes": "the others end within 1 s of a death, within the watchdog's limit and 2 s of a hang, and name "
    "the culprit; a restart ends with the same bits",
    "signals": "all processes save the same step and end with the right status, within a step, a save and 2 s; a "
    "restart ends with the same bits",
    "nonfinite": "skipped, rolled back and stopped as the limits say, the same on 1 and 8 devices; nothing that "
    "is not finite is saved or the best",
    "resume": "the state is restored to the bit, the next batch has the same examples, its loss is within 1e-5 "
    "(float64: 1e-12)",
    "two_starts": "exactly one runs, and ends with the bits of a run alone; the other names it",
}
IN_PROCESS = ("damage", "nonfinite")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--fault", choices=list(FAULTS))
    parser.add_argument("--trials", type=int, default=1, help="in all, those of before included")
    parser.add_argument("--out", type=Path, default=Path("runs/faults"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", help="of processes, instead of one drawn for each trial")
    parser.add_argument("--report", action="store_true", help="print the table of what was run")
    args = parser.parse_args()
    if not args.report and args.fault is None:
        parser.error("give --fault or --report")
    if args.kind is not None and args.fault != "processes":
        parser.error("--kind is of --fault=processes alone")
    if args.fault is not None:
        run(args.fault, args.trials, args.out.absolute(), args.seed, args.kind)
    if args.report:
        print(report(args.out))


def run(fault: str, trials: int, out: Path, seed: int, kind: str | None = None) -> None:
    """Runs the trials of a fault that are missing in OUT/FAULT.jsonl."""
    log = out / f"{fault}.jsonl"
    missing = sorted(set(range(trials)) - {line["trial"] for line in read(log)})
    if not missing:
        return
    out.mkdir(parents=True, exist_ok=True)
    trial, bench = prepare(fault, out)
    if kind is not None:
        trial = functools.partial(trial, kind=kind)
    for number in missing:
        line = attempt(fault, trial, bench, number, seed)
        with log.open("a") as stream:
            stream.write(json.dumps(line) + "\n")
        problems = "; ".join(line["problems"])
        print(f"{fault} {number}: {'held' if line['held'] else problems}", flush=True)


def prepare(fault: str, out: Path) -> tuple[Any, Any]:
    """The trial's function and what all trials share."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # A shell's background job ignores it, and so would the runs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if fault == "disk":
        from injection import storage

        storage.preload(out, out / "mounted")
    import jax
    from injection.runs import Bench

    if fault in IN_PROCESS:
        if fault == "nonfinite":
            jax.config.update("jax_num_cpu_devices", 8)
        jax.config.update("jax_compilation_cache_dir", str(out / "cache"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
        from injection import states as trials
    else:
        import sklearn.datasets  # noqa: F401  # what a run would import after its start
        from injection import trials

        import cait_jax.checkpoint.store
        import cait_jax.data.in_memory  # noqa: F401
        import train  # noqa: F401

    return getattr(trials, fault), Bench(out, launching=fault not in IN_PROCESS)


def attempt(fault: str, trial: Any, bench: Any, number: int, seed: int) -> dict[str, Any]:
    """One trial, as a line of the log."""
    from injection.runs import rm

    folder = bench.out / fault / str(number)
    rm(folder)
    folder.mkdir(parents=True)
    began = time.monotonic()
    draw = random.Random(f"{fault} {seed} {number}")
    outcome = trial(bench, draw, folder)
    problems = outcome.problems + bench.launcher.leftovers()
    if not problems:
        rm(folder)
    return {
        "fault": fault,
        "trial": number,
        "seed": seed,
        "injected": outcome.injected,
        "observed": outcome.observed,
        "problems": problems,
        "held": not problems,
        "seconds": round(time.monotonic() - began, 2),
    }


def read(log: Path) -> list[dict[str, Any]]:
    """The trials of a log; a torn last line is left out."""
    if not log.exists():
        return []
    lines = []
    for line in log.read_text().split("\n"):
        try:
            lines.append(json.loads(line))
        except ValueError:
            continue
    return lines


def report(out: Path) -> str:
    """A Markdown table of the trials so far, and what did not hold."""
    rows, failures = [], []
    for fault, holds in FAULTS.items():
        lines = read(out / f"{fault}.jsonl")
        if lines:
            rows.append([fault, len(lines), sum(line["held"] for line in lines), holds])
        kinds = Counter("; ".join(line["problems"]) for line in lines if not line["held"])
        failures += [f"{fault}, {count} times: {kind}" for kind, count in kinds.most_common()]
    header = ["fault", "trials", "held", "what must hold"]
    return "\n".join([tabulate(rows, header, "github"), *([""] if failures else []), *failures])


if __name__ == "__main__":
    main()
