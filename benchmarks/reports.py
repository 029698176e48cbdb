"""The file that a benchmark leaves: what it measured, with date, machine and versions."""

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax


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
