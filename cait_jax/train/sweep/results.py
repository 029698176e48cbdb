"""What the runs of a sweep came to: OUT/runs.jsonl, a line for each finished run, and their comparison."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from cait_jax.files import fsync, to_json
from cait_jax.reading import MAX_TEXT, parse_json, read_bytes
from cait_jax.train.keys import KEYS
from cait_jax.train.metrics import read_metrics
from cait_jax.train.sweep.settings import SEED, SweepRun

METRICS = {"eval/accuracy": max, "eval/knn_accuracy": max, "eval/loss": min}
_FIELDS = {"name", "overrides", "config", "digest", "metrics", "best", "seconds"}


def metric_of(metrics: Mapping[str, Any]) -> str | None:
    """The metric by which runs are compared; None if there is none."""
    return next((name for name in METRICS if metrics.get(name) is not None), None)


def row_of(run: SweepRun, workdir: Path, seconds: float) -> dict[str, Any]:
    """The line of a finished run.

    Keys: those of `SweepRun`, `metrics` of the last evaluation, `best` of the metric of `metric_of`, `seconds` of
    the process that finished it.
    """
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if metric_of(row)]
    last = rows[-1] if rows else {}
    metrics = {key: value for key, value in last.items() if key.startswith("eval/")}
    name = metric_of(metrics)
    best = METRICS[name](row[name] for row in rows if row.get(name) is not None) if name else None
    return {
        "name": run.name,
        "overrides": dict(run.overrides),
        "config": dict(run.config),
        "digest": run.digest,
        "metrics": metrics,
        "best": best,
        "seconds": round(seconds, 1),
    }


def read_rows(path: Path, fields: Iterable[str] = _FIELDS) -> dict[str, dict[str, Any]]:
    """Lines of a file that have these fields, by digest, a later one in place of an earlier."""
    found: dict[str, dict[str, Any]] = {}
    if path.exists():
        for line in read_bytes(path, MAX_TEXT).decode(errors="replace").splitlines():
            try:
                row = parse_json(line)
            except ValueError:  # a torn line: that run is looked at again
                continue
            if isinstance(row, dict) and row.keys() >= set(fields):
                found[str(row["digest"])] = row
    return found


def append_row(path: Path, row: Mapping[str, Any]) -> None:
    """Adds a line that is on disk when this returns; a line that was torn before it is ended."""
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * bool(torn) + to_json(row) + "\n")
    fsync(path)


def varied_keys(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The config keys, but the seed, in which the runs differ, in the order of the table of keys."""
    return [
        key
        for key in KEYS
        if key != SEED and len({text_of(row["config"].get(key)) for row in rows}) > 1
    ]


def text_of(value: Any) -> str:
    """A value of a config as a command line has it."""
    if isinstance(value, list):
        return ",".join(map(text_of, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each combination of the keys that vary but the seed, the best first.

    Keys: those of `varied_keys` as text, `metric`, `mean` and `std` (None of one run) of its last value over
    seeds, `best` (mean), `seeds`, `seconds` (mean), and `overrides` of its best run.
    """
    varied = varied_keys(rows)
    groups: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(text_of(row["config"].get(key)) for key in varied), []).append(row)
    found = []
    for texts, members in groups.items():
        name = next(filter(None, (metric_of(row["metrics"]) for row in members)), None)
        told = [row for row in members if name and row["metrics"].get(name) is not None]
        values = [row["metrics"][name] for row in told]
        best = told[values.index(METRICS[name](values))] if name else members[0]
        found.append(
            {
                **dict(zip(varied, texts, strict=True)),
                "metric": name,
                "mean": statistics.mean(values) if values else None,
                "std": statistics.stdev(values) if len(values) > 1 else None,
                "best": statistics.mean(row["best"] for row in told) if told else None,
                "seeds": len(members),
                "seconds": statistics.mean(row["seconds"] for row in members),
                "overrides": best["overrides"],
            }
        )
    sign = 1 if any(row["metric"] == "eval/loss" for row in found) else -1
    return sorted(found, key=lambda row: (row["mean"] is None, sign * (row["mean"] or 0.0)))
