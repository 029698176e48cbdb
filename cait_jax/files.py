"""Files that a crash leaves whole: fsync, checksums, atomic replacement, strict JSON, manifests of directories.

A directory with a valid manifest was written completely and has not changed since.
"""

import contextlib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cait_jax.errors import UserError, one_line, printable, writable

MANIFEST = "manifest.json"
# What Orbax expands in a path.
_GLOB = "*?[]" if os.sep == "\\" else "*?[]\\"


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
    """A path to write to, by one writer at a time; on leaving without error it is synced and replaces `path`."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        fsync(temporary)
        temporary.replace(path)
        fsync(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def json_values(value: Any) -> Any:
    """The same mappings, lists and values with None for NaN and infinity, which JSON (RFC 8259) does not have."""
    if isinstance(value, Mapping):
        return {key: json_values(member) for key, member in value.items()}
    if isinstance(value, list | tuple):
        return [json_values(member) for member in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_json(value: Any) -> str:
    """`json.dumps` with null for NaN and infinity."""
    return json.dumps(json_values(value), allow_nan=False)


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
    _write_manifest(directory, {**read_manifest(directory), **fields})


def _write_manifest(directory: Path, body: Mapping[str, Any]) -> None:
    with atomic_replace(directory / MANIFEST) as temporary:
        text = json.dumps({"sha256": _checksum(body), **body}, indent=1, allow_nan=False)
        temporary.write_text(text, encoding="utf-8")


def _checksum(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest; `DamagedError` if it is missing, unreadable or differs from its own checksum."""
    try:
        manifest: dict[str, Any] = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        checksum = manifest.pop("sha256")
    except FileNotFoundError:
        raise DamagedError(f"it has no {MANIFEST}, so its save did not finish") from None
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise DamagedError(f"{MANIFEST} cannot be read ({one_line(str(error))})") from None
    if checksum != _checksum(manifest):
        raise DamagedError(f"{MANIFEST} differs from its own SHA-256")
    return manifest


def run_folder_name(name: str) -> str:
    """The name with `_` for the characters that a path of checkpoints cannot have."""
    return re.sub(f"[{re.escape(_GLOB)}]", "_", name if writable(name) == name else printable(name))


def run_folder(workdir: str | Path) -> Path:
    """The folder of a run; not the address of a bucket, nor a path that Orbax would take for a pattern."""
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]+:/", str(workdir)):
        raise UserError(
            f"--workdir={workdir} is an address, and a run is kept in a folder: mount the bucket (gs:// with "
            "gcsfuse) and give the folder where it is mounted, or a folder of a shared file system"
        )
    path = str(Path(workdir).absolute())
    if run_folder_name(path) != path:
        raise UserError(
            f"checkpoints cannot be kept in {path}: its name is not UTF-8 or holds one of {_GLOB} which Orbax "
            "takes for a pattern; give another --workdir"
        )
    return Path(workdir)
