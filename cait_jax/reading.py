"""Reading of files that may be anything: regular ones alone, bounded in size; JSON bounded in depth."""

import errno
import json
import os
import stat
from pathlib import Path
from typing import Any

from cait_jax.errors import UserError

MAX_IMAGE = 2**30
"""Bytes of an encoded image."""
MAX_TEXT = 2**26
"""Bytes of a config, `config.json` or list of class names."""

_KINDS = (
    (stat.S_ISFIFO, "it is a named pipe"),
    (stat.S_ISSOCK, "it is a socket"),
    (stat.S_ISCHR, "it is a device"),
    (stat.S_ISBLK, "it is a device"),
)


def check_regular(path: Path, limit: int | None = None) -> None:
    """Refuses what is no regular file, or a link to none, and what has more than `limit` bytes.

    Raises:
      OSError: whose `strerror` says why; `IsADirectoryError` for a folder.
    """
    _check(path, path.stat(), limit)


def read_bytes(path: Path, limit: int) -> bytes:
    """The contents of a regular file of at most `limit` bytes; raises as `check_regular`, before it reads."""
    check_regular(path, limit)  # as to open a device may change it
    # If it has become a pipe meanwhile, opening it does not wait for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as file:  # noqa: PTH123, a descriptor
        _check(path, os.fstat(descriptor), limit)
        return file.read()


def read_json(path: Path) -> Any:
    """The value in a JSON file (UTF-8) of at most `MAX_TEXT` bytes.

    Raises:
      OSError: as `check_regular`.
      ValueError: it is no JSON, or nests too deeply.
    """
    return parse_json(read_bytes(path, MAX_TEXT).decode("utf-8"))


def parse_json(text: str) -> Any:
    """As `json.loads`, with a `ValueError` for text that nests too deeply."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error


def check_format(path: Path, found: Any, newest: int) -> None:
    """Refuses a file whose format number is greater than the newest that is read, or is none.

    Raises:
      UserError: naming both.
    """
    if type(found) is not int or found < 1:
        raise UserError(f"{path} has {found!r} for its format and is damaged: write it again")
    if found > newest:
        raise UserError(
            f"{path} is of format {found}, and this version reads {newest}: install a newer cait-jax"
        )


def _check(path: Path, status: os.stat_result, limit: int | None) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    for is_kind, what in _KINDS:
        if is_kind(status.st_mode):
            raise OSError(errno.EINVAL, f"{what}, no regular file", str(path))
    if limit is not None and status.st_size > limit:
        size = f"it has {status.st_size:,} bytes, more than the limit of {limit:,}"
        raise OSError(errno.EFBIG, size, str(path))
