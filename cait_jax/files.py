"""Files that a crash leaves whole: fsync, checksums, atomic replacement, strict JSON; a run's folder, its lock."""

import contextlib
import errno
import fcntl
import hashlib
import json
import math
import os
import re
import secrets
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from cait_jax import reading
from cait_jax.errors import UserError, printable, writable

LOCK = "lock.json"
HEARTBEAT_S, STALE_S = 10.0, 60.0
_NAMED_WITHIN_S = 1.0
# What Orbax expands in a path.
_GLOB = "*?[]" if os.sep == "\\" else "*?[]\\"


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


def run_folder_name(name: str) -> str:
    """The name with `_` for the characters that a path of checkpoints cannot have."""
    return re.sub(f"[{re.escape(_GLOB)}]", "_", name if writable(name) == name else printable(name))


def run_folder(workdir: str | Path) -> Path:
    """The folder of a run, which may not exist yet.

    Raises:
      UserError: it is the address of a bucket, or a path that Orbax would take for a pattern, or nothing can be
        written in it.
    """
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
    check_folder(Path(workdir), parents=True)
    return Path(workdir)


def check_folder(path: Path, *, parents: bool = False) -> None:
    """Tries an output directory, which may not exist yet, nor with `parents` those above it, before the work.

    Raises:
      UserError: a file cannot be made in it or, where it is missing, in the nearest directory above.
    """
    there = path.absolute()
    try:
        while not _is_there(there):
            there = there.parent
        if not parents and there not in (path.absolute(), path.absolute().parent):
            raise FileNotFoundError(errno.ENOENT, f"there is no directory {path.parent}")
        if not there.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, f"{there} is no directory")
        descriptor, name = tempfile.mkstemp(prefix=".cait-", dir=there)
        os.close(descriptor)
        Path(name).unlink()
    except OSError as error:
        raise UserError(
            f"nothing can be written in {path}: {error.strerror}; choose another directory"
        ) from error


def _is_there(path: Path) -> bool:
    """Whether a path exists, if only as a link; raises `OSError` for one that cannot, as a name too long."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


class DirectoryLock(AbstractContextManager["DirectoryLock", None]):
    """A directory in use by one process: DIRECTORY/lock.json names it and is touched every `HEARTBEAT_S` seconds.

    On one host the system's own lock (flock) decides, which ends with its process. Shared and mounted storage may
    not pass it on: there a lock of another host holds until its file is `STALE_S` seconds old, by the storage's
    clock.

    Attributes:
      taken_over: a sentence about the process that left the lock behind, else "".
    """

    def __init__(self, directory: Path, option: str = "--workdir") -> None:
        """Takes the lock; `option` is by what a user gives another directory.

        Raises:
          UserError: another process holds it; its host and number are named.
        """
        self._path = directory / LOCK
        self._option = option
        self._token = secrets.token_hex(8)
        self._lost = ""
        self._file = self._open()
        try:
            self.taken_over = self._take()
        except BaseException:
            os.close(self._file)
            raise
        self._released = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        self._thread.join()
        if not self._lost:
            with contextlib.suppress(OSError):
                self._path.unlink()
        os.close(self._file)

    def check(self) -> None:
        """Raises `UserError` if another process has taken the lock, which a stopped or cut off process allows."""
        if self._lost:
            raise UserError(self._lost)

    def _open(self) -> int:
        named_by = time.monotonic() + _NAMED_WITHIN_S
        while True:
            file = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(file)
                os.close(file)
                if not holder and time.monotonic() < named_by:  # it has just taken it
                    time.sleep(0.01)
                    continue
                raise self._refusal(holder) from None
            except OSError:  # a file system without locks
                return file
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file), self._path.stat()):
                    return file
            os.close(file)  # its holder has just deleted it

    def _take(self) -> str:
        holder = _holder(self._file)
        host, boot = socket.gethostname(), _boot_id()
        here = (holder.get("host"), holder.get("boot")) == (host, boot)
        if holder and (_runs(holder) if here else self._age() < STALE_S):
            raise self._refusal(holder)
        record = {
            "host": host,
            "boot": boot,  # hosts can share a name
            "process": os.getpid(),
            "process_start": _process_start(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "token": self._token,
        }
        os.ftruncate(self._file, 0)
        os.pwrite(self._file, json.dumps(record).encode(), 0)
        os.fsync(self._file)
        if not holder:
            return ""
        return f"took over {self._path.parent} from {_named(holder)}, which has ended without releasing it"

    def _age(self) -> float:
        """Seconds since the last heartbeat, by the clock of the storage."""
        probe = self._path.with_name(f".{LOCK}.{self._token}")
        try:
            probe.touch()
            return probe.stat().st_mtime - os.fstat(self._file).st_mtime
        finally:
            probe.unlink(missing_ok=True)

    def _refusal(self, holder: Mapping[str, Any]) -> UserError:
        return UserError(
            f"{self._path.parent} is in use by {_named(holder)}: wait for its end or end it (on another "
            f"host the lock lapses {STALE_S:.0f} seconds later), or give another {self._option}"
        )

    def _beat(self) -> None:
        seconds = 1.0  # the first soon, for two hosts that took it at the same moment
        while not self._released.wait(seconds):
            seconds = HEARTBEAT_S
            with contextlib.suppress(OSError):  # storage that is away for a while
                holder = _holder(os.open(self._path, os.O_RDONLY), close=True)
                if holder and holder.get("token") != self._token:
                    self._lost = (
                        f"{self._path.parent} was taken over by {_named(holder)} while this process was stopped "
                        "or cut off: nothing more is written; what is saved goes on there"
                    )
                    return
                os.utime(self._file)


def _holder(file: int, *, close: bool = False) -> dict[str, Any]:
    """Who a lock's file names; empty if nobody, or if it can be read by nobody."""
    try:
        found = reading.parse_json(os.pread(file, 4096, 0).decode())
    except ValueError:
        return {}
    finally:
        if close:
            os.close(file)
    return found if isinstance(found, dict) else {}


def _named(holder: Mapping[str, Any]) -> str:
    if not holder:
        return "another process"
    return f"process {holder.get('process')} on {holder.get('host')} (since {holder.get('since')})"


def _runs(holder: Mapping[str, Any]) -> bool:
    """Whether a process of this host still runs; another process may have its number."""
    start = _process_start(holder.get("process"))
    return start is not None and start == holder.get("process_start")


def _process_start(process: object) -> str | None:
    """When a process was started, in the kernel's own unit; None if there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _boot_id() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None
