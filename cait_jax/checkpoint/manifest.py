"""Manifests: which files a step has, with checksums, and which step, run and config it is of.

A step with a valid manifest was written completely, as its last file, and has not changed since.
"""

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from cait_jax.errors import one_line
from cait_jax.files import atomic_replace, fsync, sha256
from cait_jax.reading import check_format, read_json

MANIFEST = "manifest.json"
RUN = "run.json"
# Orbax's items, and the folders of a step.
STATE = "state"
META = "meta"
# Before 2 it has no `config_sha256`, before 1 neither a format nor a run.
FORMAT = 2


class DamagedError(Exception):
    """A directory that does not match its manifest; the message names the file."""


def commit(directory: Path, fields: Mapping[str, Any]) -> None:
    """Syncs all files under a directory, then writes its manifest: their sizes and SHA-256, and `fields`."""
    files = {}
    for path in sorted(directory.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            name = path.relative_to(directory).as_posix()
            files[name] = {"size": path.stat().st_size, "sha256": sha256(path)}
        fsync(path)
    fsync(directory)
    fsync(directory.parent)
    _write_manifest(directory, {**fields, "files": files})


def amend(directory: Path, fields: Mapping[str, Any]) -> None:
    """Replaces fields of a valid manifest."""
    _write_manifest(directory, {**read(directory), **fields})


def _write_manifest(directory: Path, body: Mapping[str, Any]) -> None:
    with atomic_replace(directory / MANIFEST) as temporary:
        text = json.dumps({"sha256": _json_sha256(body), **body}, indent=1, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")


def read(directory: Path) -> dict[str, Any]:
    """The manifest; `DamagedError` if it is missing, unreadable, incomplete or differs from its own checksum."""
    if not (directory / MANIFEST).exists():
        raise DamagedError(f"it has no {MANIFEST}, so its save did not finish")
    try:
        manifest = read_json(directory / MANIFEST)
    except (OSError, ValueError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({one_line(str(error))})") from None
    if not isinstance(manifest, dict) or "sha256" not in manifest:
        raise DamagedError(f"{MANIFEST} is none")
    checksum = manifest.pop("sha256")
    if checksum != _json_sha256(manifest):
        raise DamagedError(f"{MANIFEST} differs from its own SHA-256")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(file, dict) and file.keys() == {"size", "sha256"} for file in files.values()
    ):
        raise DamagedError(f"{MANIFEST} lists no files")
    return manifest


def run_id(directory: Path) -> str | None:
    """The run whose checkpoints these are, by `run.json`, else by the newest step; None: neither has an id."""
    with contextlib.suppress(OSError, ValueError):
        run = read_json(directory / RUN)
        if isinstance(run, dict) and isinstance(run.get("run"), str):
            return str(run["run"])
    steps = (int(path.name) for path in directory.glob("*") if path.name.isdecimal())
    for step in sorted(steps, reverse=True):
        with contextlib.suppress(DamagedError):
            return read(directory / str(step)).get("run")
    return None


def cached(path: Path) -> dict[str, Any]:
    """The manifest of a step, read again only when the file has changed; not to be written to.

    Raises:
      DamagedError: as `read`.
    """
    try:
        status = (path / MANIFEST).stat()
    except OSError:
        return read(path)
    return _manifest(path, (status.st_ino, status.st_mtime_ns, status.st_size))


@functools.lru_cache(maxsize=256)
def _manifest(path: Path, stamp: tuple[int, ...]) -> dict[str, Any]:
    return read(path)


def of_step(
    path: Path, run: str | None, get: Callable[[Path], dict[str, Any]] = read
) -> dict[str, Any]:
    """The manifest of a step, if it is of this step and run; `metrics` is a dict.

    Raises:
      DamagedError: it is damaged, or of another step or run.
      UserError: a later version wrote it.
    """
    manifest = get(path)
    if "format" in manifest:
        check_format(path, manifest["format"], FORMAT)
    if manifest.get("step") != int(path.name):
        raise DamagedError(f"it is of step {manifest.get('step')}, by its {MANIFEST}")
    if run is not None and manifest.get("run", run) != run:
        raise DamagedError(f"it is of another run ({manifest['run']}), by its {MANIFEST}")
    metrics = manifest.get("metrics")
    if not isinstance(metrics, dict) or not all(
        isinstance(value, int | float | None) for value in metrics.values()
    ):
        raise DamagedError(f"{MANIFEST} has no metrics, or some that are no numbers")
    return manifest


def verify(path: Path, run: str | None, prefix: str = "") -> None:
    """Checks a step's manifest, the sizes of all files, the SHA-256 of those with the prefix, and the config's.

    Raises:
      DamagedError: naming the first file that is missing, differs, or is not in the manifest.
      UserError: a later version wrote it.
    """
    manifest = of_step(path, run)
    files = manifest["files"]
    for name, expected in files.items():
        try:
            size = (path / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name} is missing ({error.strerror})") from None
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {expected['size']}")
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        if file.is_file() and name not in files and not _is_of_the_file_system(file.name):
            raise DamagedError(f"{name} is not in its {MANIFEST}")
    for name in filter(lambda name: name.startswith(prefix), files):
        try:
            found = sha256(path / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
        if found != files[name]["sha256"]:
            raise DamagedError(f"{name} differs from its SHA-256 in {MANIFEST}")
    if manifest.get("format", 0) >= 2 and manifest.get("config_sha256") != _config_sha256(path):
        raise DamagedError(f"its config is not the one of its {MANIFEST}")


def config_sha256(meta: Mapping[str, Any]) -> str:
    """Of the config in a step's metadata; of null where they have none."""
    return _json_sha256(meta.get("config"))


def _config_sha256(path: Path) -> str:
    try:
        return config_sha256(read_json(path / META / "metadata"))
    except (OSError, ValueError, AttributeError) as error:
        raise DamagedError(f"{META}/metadata cannot be read ({one_line(str(error))})") from None


def _is_of_the_file_system(name: str) -> bool:
    """Whether it is the manifest, or a file that an interrupted replacement, NFS or macOS leaves."""
    return name in (MANIFEST, f".{MANIFEST}.tmp", ".DS_Store") or name.startswith((".nfs", "._"))


def _json_sha256(value: Any) -> str:
    """The SHA-256 of a value as JSON with sorted keys, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
