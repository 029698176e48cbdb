"""A grid of runs of one recipe: which, each in a process of its own, and what came out.

OUT/NAME is the workdir of a run, OUT/NAME.log its output; OUT/runs.jsonl has a line for each finished run, which
is not run again. One that was stopped goes on from its checkpoint.
"""

import contextlib
import dataclasses
import functools
import glob
import hashlib
import itertools
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from cait_jax.errors import UserError, config_flags, nearest, one_line, quiet_libraries, speaking
from cait_jax.files import fsync, run_folder_name, to_json
from cait_jax.processes import end_program
from cait_jax.reading import MAX_TEXT, parse_json, read_bytes
from cait_jax.renamed import OLD_KEYS
from cait_jax.train.config import load_config
from cait_jax.train.keys import KEYS, Several, Size
from cait_jax.train.metrics import read_metrics

_SEED = "seed"
_LONGEST_NAME = 100
_METRICS = {"eval/accuracy": max, "eval/knn_accuracy": max, "eval/loss": min}


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A run: its `name`, which its workdir has, and texts of config keys, those that vary and the others."""

    name: str
    varied: Mapping[str, str]
    fixed: Mapping[str, str]

    @property
    def overrides(self) -> dict[str, str]:
        """All of them."""
        return {**self.fixed, **self.varied}


def grid(file: str, settings: Mapping[str, str]) -> list[SweepRun]:
    """The runs of a recipe with every combination of values, the last key varying fastest.

    Args:
      file: of the recipe.
      settings: config keys to values with commas between them; with semicolons, where a value has commas itself.

    Raises:
      UserError: there is no such file, key or value, or nothing varies.
    """
    values = {name: _values(name, text) for name, text in settings.items()}
    varied = [name for name, texts in values.items() if len(texts) > 1]
    if not varied:
        raise UserError(
            "nothing varies: give several values of a key, such as --config.optimizer.learning_rate=1e-3,3e-4"
        )
    for name in varied:
        if twice := [text for text in values[name] if values[name].count(text) > 1]:
            raise UserError(f"--config.{name} has {twice[0]!r} twice: give each value once")
    short = {name: name.rpartition(".")[2] for name in varied}
    runs = []
    for texts in itertools.product(*values.values()):
        overrides = dict(zip(values, texts, strict=True))
        load_config(file, overrides)
        parts = [
            f"{name if list(short.values()).count(short[name]) > 1 else short[name]}={overrides[name]}"
            for name in varied
        ]
        runs.append(
            SweepRun(
                _file_name("_".join(parts)),
                {name: overrides[name] for name in varied},
                {name: text for name, text in overrides.items() if name not in varied},
            )
        )
    return runs


def _values(name: str, text: str) -> list[str]:
    key = KEYS.get(OLD_KEYS.get(name, name))
    if key is None:
        raise UserError(f"there is no config key {name!r}; {nearest(name, KEYS)}")
    return text.split(";" if isinstance(key.kind, Several | Size) else ",")


def _file_name(name: str) -> str:
    name = run_folder_name(re.sub(r"[/\\\s]", "-", name))
    if len(name) <= _LONGEST_NAME:
        return name
    return f"{name[:_LONGEST_NAME]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def run_sweep(
    file: str,
    runs: Sequence[SweepRun],
    out: Path,
    *,
    jobs: int = 1,
    finished: Callable[[SweepRun, dict[str, Any] | str], None] = lambda run, result: None,
) -> list[dict[str, Any]]:
    """Trains what is not finished, `jobs` at a time, and gives a row for each finished run.

    A row: `name`, `varied`, `metrics` of the last evaluation, `best` (of the metric of `metric_of`), `seconds` of
    the process that finished it. Runs at a time share the cores evenly, and take a GPU each where there are any.

    Args:
      finished: is called with each run as it ends, and its row, or the reason for which it failed.

    Raises:
      KeyboardInterrupt: after every process has saved and ended.
    """
    out.mkdir(parents=True, exist_ok=True)
    known = {row["name"]: row for row in _read_rows(out)}
    waiting = [run for run in runs if known.get(run.name, {}).get("overrides") != run.overrides]
    places: SimpleQueue[int] = SimpleQueue()
    for place in range(jobs):
        places.put(place)
    processes: set[subprocess.Popen[bytes]] = set()
    stop = threading.Event()

    def work(run: SweepRun) -> dict[str, Any] | str | None:
        place = places.get()
        try:
            return None if stop.is_set() else _train(file, run, out, place, jobs, processes)
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool, _interrupted_by_sigterm():
        futures = {pool.submit(work, run): run for run in waiting}
        try:
            for future in as_completed(futures):
                result = future.result()
                if isinstance(result, dict):
                    known[futures[future].name] = result
                    _append(out, result)
                if result is not None:
                    finished(futures[future], result)
        except KeyboardInterrupt:
            stop.set()
            for process in list(processes):
                process.send_signal(signal.SIGINT)  # it saves and ends, for which the pool waits
            raise
    return [
        known[run.name] for run in runs if known.get(run.name, {}).get("overrides") == run.overrides
    ]


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _train(
    file: str,
    run: SweepRun,
    out: Path,
    place: int,
    jobs: int,
    processes: set[subprocess.Popen[bytes]],
) -> dict[str, Any] | str | None:
    """A row for a run that finished, the reason for which it failed, or None if it was stopped."""
    workdir, log = out / run.name, out / f"{run.name}.log"
    settings = [f"{key}={text}" for key, text in run.overrides.items()]
    command = [sys.executable, "-m", "cait_jax.train.sweep", file, str(workdir), *settings]
    start = time.monotonic()
    with log.open("ab") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env={**os.environ, **_share(place, jobs)},
            start_new_session=True,  # Ctrl-C reaches it once, through `run_sweep`
        )
        processes.add(process)
        status = process.wait()
        processes.discard(process)
    if status == 130:
        return None
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or ["it ended without a word"]
        return one_line(lines[-1])
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if metric_of(row)]
    metrics = (
        {key: value for key, value in rows[-1].items() if key.startswith("eval/")} if rows else {}
    )
    name = metric_of(metrics)
    best = _METRICS[name](row[name] for row in rows if row.get(name) is not None) if name else None
    return {
        "name": run.name,
        "overrides": run.overrides,
        "varied": dict(run.varied),
        "metrics": metrics,
        "best": best,
        "seconds": round(time.monotonic() - start, 1),
    }


def _share(place: int, jobs: int) -> dict[str, str]:
    """Environment variables of a run beside others: a GPU of its own, and its part of the cores."""
    if jobs == 1:
        return {}
    found = {"CAIT_SWEEP_PLACE": f"{place}/{jobs}"}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else glob.glob("/proc/driver/nvidia/gpus/*")  # noqa: PTH207
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)] if given else str(place % len(gpus))
    return found


def _take_cores() -> None:
    """Bounds this process to its part of the cores, where the system can."""
    place, _, jobs = os.environ.get("CAIT_SWEEP_PLACE", "").partition("/")
    if jobs and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(place) :: int(jobs)] or [cores[int(place) % len(cores)]]
        os.sched_setaffinity(0, own)


def metric_of(metrics: Mapping[str, Any]) -> str | None:
    """The metric by which runs are compared; None if there is none."""
    return next((name for name in _METRICS if metrics.get(name) is not None), None)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each combination of the keys that vary but the seed, the best first.

    Keys: the varied keys, `metric`, `mean` and `std` (None of one run) of its last value over seeds, `best`
    (mean), `seeds`, `seconds` (mean).
    """
    groups: dict[tuple[tuple[str, str], ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = tuple((name, text) for name, text in row["varied"].items() if name != _SEED)
        groups.setdefault(key, []).append(row)
    found = []
    for key, members in groups.items():
        name = metric_of(members[0]["metrics"])
        values = [
            row["metrics"][name] for row in members if name and row["metrics"].get(name) is not None
        ]
        found.append(
            {
                **dict(key),
                "metric": name,
                "mean": statistics.mean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "best": statistics.mean(row["best"] for row in members) if values else None,
                "seeds": len(members),
                "seconds": statistics.mean(row["seconds"] for row in members),
            }
        )
    sign = 1 if any(row["metric"] == "eval/loss" for row in found) else -1
    return sorted(found, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0)))


def _read_rows(out: Path) -> Iterator[dict[str, Any]]:
    path = out / "runs.jsonl"
    if not path.exists():
        return
    for line in read_bytes(path, MAX_TEXT).decode(errors="replace").splitlines():
        try:
            row = parse_json(line)
        except ValueError:  # a torn line: that run is looked at again
            continue
        if isinstance(row, dict) and {
            "name",
            "overrides",
            "varied",
            "metrics",
            "best",
            "seconds",
        } <= set(row):
            yield row


def _append(out: Path, row: Mapping[str, Any]) -> None:
    path = out / "runs.jsonl"
    with path.open("a") as file:
        file.write(to_json(row) + "\n")
    fsync(path)


def _main(file: str, workdir: str, *settings: str) -> int:
    """One run, as `train.py` makes it."""
    _take_cores()
    from cait_jax.cores import use_cores
    from cait_jax.train import train
    from cait_jax.train.setup import mesh_fits

    config = load_config(file, dict(text.split("=", 1) for text in settings))
    use_cores(functools.partial(mesh_fits, config))
    return 0 if train(config, workdir).finished else 130


if __name__ == "__main__":
    quiet_libraries()
    with speaking(config_flags):
        try:
            status = _main(*sys.argv[1:])
        except BaseException as error:
            from cait_jax.train import NonFiniteError

            end_program("train", error, (UserError, NonFiniteError))
    sys.exit(status)
