"""The files that benchmarks leave: what was measured, with date, machine and versions."""

import json
import os
import platform
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

RESULTS = (
    Path(__file__).parent / "studies" / "results"
)  # of runs that take hours: a line of JSON each


def write_report(path: Path, **measured: Any) -> None:
    """Writes a JSON object; its folder is made if missing."""
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {jax.devices()[0].device_kind}",
        "cores": os.cpu_count(),
        "jax": jax.__version__,
        **measured,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """One write, so that commands at a time do not mix their lines."""
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a file; none if it is missing."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
