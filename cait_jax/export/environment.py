"""The Python environment of jax2onnx, which asks for an older Orbax than checkpoints need."""

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import cait_jax
from cait_jax.errors import Literal, UserError, one_line, setting
from cait_jax.files import check_folder

# Tested by `benchmarks/export_onnx.py`.
JAX2ONNX = "0.17.1"


def requirements() -> list[str]:
    """What pip installs in it: JAX and Flax as they are here."""
    return [
        f"jax2onnx=={JAX2ONNX}",
        *(f"{name}=={version(name)}" for name in ("jax", "flax", "ml-collections", "safetensors")),
        "onnxruntime>=1.24.1",
    ]


def environment_python(directory: Path | None, *, install: bool) -> Path:
    """The interpreter of an environment that has `requirements`, which is made first if asked for.

    Args:
      directory: of the environment.
      install: make it by venv and pip where it does not exist yet.

    Raises:
      UserError: it does not exist, lacks something, or cannot be made.
    """
    given = setting("environment", str(directory) if directory else Literal("DIR"))
    make = setting("install", True)
    if directory is None:
        raise UserError(
            "ONNX is written by jax2onnx, in an environment of its own because it asks for an older Orbax: give "
            f"{given}, and {make} to make it there (about 1 GB)"
        )
    python = directory.absolute() / "bin" / "python"
    if not python.exists():
        if not install:
            raise UserError(f"there is no Python environment in {directory}: add {make} to make it")
        _make(directory, python)
    checked = run(python, ["-c", _VERSIONS])
    if checked.returncode:
        lacking = one_line((checked.stderr.strip().splitlines() or ["it ended without a word"])[-1])
        raise UserError(
            f"the environment in {directory} cannot be used ({lacking}): give {setting('environment')} another "
            f"directory, with {make}"
        )
    here = f"{version('jax')} {version('flax')}"
    if checked.stdout.strip() != here:
        raise UserError(
            f"the environment in {directory} has JAX and Flax {checked.stdout.strip()}, and here they are {here}: "
            f"give {setting('environment')} another directory, with {make}"
        )
    return python


_VERSIONS = """
from importlib.metadata import version
_ = [version(name) for name in ("jax2onnx", "onnxruntime", "ml-collections", "safetensors")]
print(version("jax"), version("flax"))
"""


def run(python: Path, arguments: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """Runs the interpreter isolated from this process's environment, on the CPU; output is captured."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "CAIT_JAX": str(Path(cait_jax.__file__).parent),
    }
    return subprocess.run(
        [python, "-I", *arguments], env=environment, capture_output=True, text=True, check=False
    )


def _make(directory: Path, python: Path) -> None:
    if directory.exists() and any(directory.iterdir()):
        raise UserError(
            f"{directory} is neither empty nor a Python environment: give {setting('environment')} another "
            "directory"
        )
    check_folder(directory, parents=True)
    for command in (
        [sys.executable, "-m", "venv", str(directory)],
        [str(python), "-m", "pip", "install", "--quiet", *requirements()],
    ):
        ended = subprocess.run(command, capture_output=True, text=True, check=False)
        if ended.returncode:
            lines = [line for line in ended.stderr.strip().splitlines() if "notice" not in line]
            reason = one_line((lines or ["it ended without a word"])[-1])
            raise UserError(
                f"the environment in {directory} could not be made ({reason}): mend that, delete the directory "
                "and try again"
            )
