"""Files that a crash leaves whole: fsync, checksums, atomic replacement, strict JSON, manifests of directories.

A directory with a valid manifest was written completely and has not changed since.
"""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cait_jax.errors import one_line

MANIFEST = "manifest.json"


class DamagedError(Exception):
    """A directory that does not match its manifest; the message names the file."""


def fsync(path: Path) -> None:
    """Returns when a file's contents, or a directory's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@contextlib.contextmanager
def atomic_replace(path: Path) -> Iterator[Path]:
    """Gives a path to write to; on leaving, what is there is synced and takes the place of `path`.

    After an error, or a crash at any moment, `path` is as it was before or is the new file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def json_values(value: Any) -> Any:
    """The same mappings, lists and values with None for NaN and infinity, which JSON (RFC 8259) does not have."""
    if isinstance(value, Mapping):
        return {key: json_values(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinity."""
    return json.dumps(json_values(value), allow_nan=False, **options)


def commit(directory: Path, fields: Mapping[str, Any]) -> None:
    """Syncs everything under a directory, then writes its manifest: size and SHA-256 of each file, and `fields`.

    Raises:
      OSError: there is no manifest then.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} was not written")
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
    """Replaces fields of a manifest.

    Raises:
      DamagedError: there is no valid manifest.
      OSError: the manifest is as it was then.
    """
    _write_manifest(directory, {**read_manifest(directory), **fields})


def _write_manifest(directory: Path, body: Mapping[str, Any]) -> None:
    with atomic_replace(directory / MANIFEST) as temporary:
        text = json.dumps({"sha256": _checksum(body), **body}, indent=1, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """A manifest, checked against its own checksum.

    Raises:
      DamagedError: it is missing, unreadable or changed.
    """
    try:
        manifest = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("sha256")
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}, so its save did not finish") from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({one_line(str(error))})") from None
    if checksum != _checksum(manifest):
        raise DamagedError(f"{MANIFEST} differs from its own SHA-256")
    return manifest


def verify(directory: Path, prefix: str = "") -> None:
    """Checks the sizes of all files against the manifest, and the SHA-256 of those whose name has the prefix.

    Raises:
      DamagedError: naming the first file that is missing or differs.
    """
    files = read_manifest(directory)["files"]
    for name, expected in files.items():
        try:
            size = (directory / name).stat().st_size
        except OSError as error:
            raise DamagedError(f"{name} is missing ({error.strerror})") from None
        if size != expected["size"]:
            raise DamagedError(f"{name} has {size} bytes instead of {expected['size']}")
    for name in filter(lambda name: name.startswith(prefix), files):
        try:
            found = sha256(directory / name)
        except OSError as error:
            raise DamagedError(f"{name} cannot be read ({error.strerror})") from None
        if found != files[name]["sha256"]:
            raise DamagedError(f"{name} differs from its SHA-256 in {MANIFEST}")
