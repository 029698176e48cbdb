"""The seal of a checkpoint: its files synced to the disk, then a manifest of their sums put in place.

A directory with a manifest that holds is one that was written whole and has not changed since.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


class BrokenError(Exception):
    """A sealed directory that cannot be used; the message names the file."""


def seal(path: Path, step: int, metrics: dict[str, float | None]) -> None:
    """Makes a committed step durable and puts the manifest in place.

    Args:
      path: directory of the step.
      step: its number.
      metrics: of the step, kept in the manifest.

    Raises:
      OSError: if the disk refuses; no manifest is in place then.
    """
    files = {}
    for file in _files(path):
        files[file.relative_to(path).as_posix()] = {
            "size": file.stat().st_size,
            "sha256": _sha256(file),
        }
        fsync(file)
    for directory in (path, *(p for p in path.rglob("*") if p.is_dir())):
        fsync(directory)
    fsync(path.parent)

    body = {"step": step, "metrics": metrics, "files": files}
    temporary = path / f"{MANIFEST}.tmp"
    text = json.dumps({"sha256": _digest(body), **body}, indent=1, allow_nan=False)
    temporary.write_text(text, encoding="utf-8")
    fsync(temporary)
    temporary.replace(path / MANIFEST)
    fsync(path)


def _files(path: Path) -> Iterator[Path]:
    """Every file of a step but the manifest."""
    if not path.is_dir():
        raise FileNotFoundError(f"{path} was not written")
    for file in sorted(path.rglob("*")):
        if file.is_file() and file.name not in (MANIFEST, f"{MANIFEST}.tmp"):
            yield file


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def fsync(path: Path) -> None:
    """Brings a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_sealed(path: Path) -> bool:
    """Whether the directory has a manifest that holds; its files are not looked at."""
    try:
        read_manifest(path)
    except BrokenError:
        return False
    return True


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the step at `path`, checked against its own sum.

    Raises:
      BrokenError: if it is missing, unreadable or changed.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        digest = manifest.pop("sha256")
    except FileNotFoundError:
        raise BrokenError(f"it has no {MANIFEST}, so its save did not finish") from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise BrokenError(f"{MANIFEST} cannot be read ({one_line(str(error))})") from None
    if digest != _digest(manifest):
        raise BrokenError(f"{MANIFEST} differs from its own SHA-256")
    return manifest


def _check_sizes(path: Path) -> dict[str, str]:
    """Checks that each file of a sealed step is there in its length. Returns their SHA-256."""
    files = read_manifest(path)["files"]
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise BrokenError(f"{name} is missing ({error.strerror})") from None
        if size != expected["size"]:
            raise BrokenError(f"{name} has {size} bytes instead of {expected['size']}")
    return {name: expected["sha256"] for name, expected in files.items()}


def check_files(path: Path, within: str = "") -> None:
    """Checks the size of every file of a sealed step, and the sum of those under `within`.

    Raises:
      BrokenError: naming the first file that is missing or differs.
    """
    for name, expected in _check_sizes(path).items():
        if name.startswith(within):
            try:
                found = _sha256(path / name)
            except OSError as error:
                raise BrokenError(f"{name} cannot be read ({error.strerror})") from None
            if found != expected:
                raise BrokenError(f"{name} differs from its SHA-256 in {MANIFEST}")


def one_line(text: str) -> str:
    """`text` without line breaks; of a long one the beginning and the end, where the cause is."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-200:]}"
