"""Processes: how each ends, and how several find each other, are one run and end together.

The sentence that ends a program is the last line of standard error. Libraries write there too (threads, C++, until
the process is gone), so nothing is written after it.
"""

import contextlib
import errno
import multiprocessing
import os
import re
import secrets
import sys
import threading
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

import jax
import numpy as np
from jax.experimental import multihost_utils

from cait_jax.errors import UserError, Way, advise, one_line, printable

if TYPE_CHECKING:
    from cait_jax.peers import Peers

_peers: "Peers | None" = None
_PATIENCE_S = 2.0
_KNOWN_WITHIN_S = 1.0  # after a failed exchange: who has ended
_MOST_PROCESSES = 2**20
# What no program can foresee of the file system, and the remedy.
_REMEDIES = {
    code: remedy
    for remedy, codes in {
        "make room, or choose another place": (errno.ENOSPC, errno.EDQUOT, errno.EFBIG),
        "change its permissions, or choose another place": (errno.EACCES, errno.EPERM),
        "check the path, or choose another place": (errno.ENOENT,),
        "check the disk, or choose another place": (errno.EIO,),
        "mount it again, or choose another place": (errno.ESTALE,),
        "choose another place": (errno.EROFS, errno.ELOOP, errno.ENOTDIR, errno.EEXIST),
        "give a file": (errno.EISDIR,),
        "choose a shorter name": (errno.ENAMETOOLONG,),
    }.items()
    for code in codes
}

# Of JAX's exceptions, those of its means of exchange (Gloo on CPUs, NCCL on GPUs) and of its coordination service.
_GONE = re.compile(
    "Gloo .* failed|NCCL .*(remote process exited|network error)"
    "|(UNAVAILABLE|DEADLINE_EXCEEDED|ABORTED|CANCELLED|INTERNAL): .*([Bb]arrier|coordination)",
    re.DOTALL,
)


def end_program(name: str, error: BaseException, errors: tuple[type[Exception], ...]) -> NoReturn:
    """Ends the process by what a program raised: with a sentence, if it is a mistake of the user's.

    Args:
      name: of the program, which begins the sentence.
      errors: exceptions that are a sentence. Any other is a defect and passes, with its traceback.
    """
    if isinstance(error, KeyboardInterrupt):
        leave(130, f"{name}: interrupted")
    if isinstance(error, SystemExit) and isinstance(error.code, str):
        leave(1, error.code)
    sentence = _of_other_process(error)
    if sentence is None:
        sentence = str(error) if isinstance(error, errors) else explain(error)
    if sentence is None:
        raise error
    leave(1, f"{name}: {sentence}")


def leave(code: int, last: str | None = None) -> NoReturn:
    """Ends the process now, `last` being the last line of standard error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    stderr = None
    with contextlib.suppress(OSError):
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on others write there
    _end_workers()
    with contextlib.suppress(OSError):
        if stderr is not None and last is not None:
            encoding = sys.stderr.encoding or "utf-8"
            os.write(stderr, f"{printable(last)}\n".encode(encoding, errors="backslashreplace"))
    os._exit(code)


def _end_workers() -> None:
    """Ends worker processes, whose own last words would follow the sentence."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(_PATIENCE_S)
    with contextlib.suppress(Exception):  # private: it reports what was left behind when it ends
        from multiprocessing import resource_tracker

        tracker: Any = resource_tracker
        tracker._resource_tracker._stop()


def explain(error: BaseException) -> str | None:
    """A sentence for a refusal by the file system, too little memory, or no device; None for any other error."""
    if isinstance(error, OSError) and error.errno in _REMEDIES:
        reason = (error.strerror or os.strerror(error.errno)).lower()
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{reason}; {_REMEDIES[error.errno]}"
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        ways = advise(
            Way("lower {}", "batch_size"), Way("lower {}", "image_size"), "use a smaller model"
        )
        return f"there is too little memory ({one_line(str(error))}): {ways}"
    if isinstance(error, RuntimeError | AssertionError) and not _has_devices():
        platforms = os.environ.get("JAX_PLATFORMS")
        return f"JAX finds no device of JAX_PLATFORMS={platforms}: install JAX for it, or unset JAX_PLATFORMS"
    return None


def failed_exchange(error: BaseException | None) -> str | None:
    """What JAX says of a failed exchange with another process, in an exception or one that it came from."""
    while error is not None and jax.distributed.is_initialized():
        # Orbax turns JAX's RuntimeError into a ValueError.
        if isinstance(error, RuntimeError | ValueError) and _GONE.search(str(error)):
            return one_line(str(error))
        error = error.__cause__ or error.__context__
    return None


def _of_other_process(error: BaseException) -> str | None:
    """A sentence for an exception that follows from another process's end."""
    reason = failed_exchange(error)
    if reason is None:
        return None
    return (_peers and _peers.verdict(_KNOWN_WITHIN_S)) or (
        f"another process of this run has ended or does not answer ({reason}): look at its last line for the "
        "cause; the same command, in all processes, goes on from the last checkpoint"
    )


def _has_devices() -> bool:
    try:
        return bool(jax.devices())
    except (RuntimeError, AssertionError):  # where no platform can be initialised JAX raises either
        return False


def join_processes(
    *,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    start_seconds: float = 600.0,
    heartbeat_seconds: int = 100,
) -> None:
    """Connects this process with the others of its run. To be called before JAX is used.

    Without arguments they are found as JAX finds them: on TPU pods, in Slurm steps and under Open MPI up to 4.
    Process 0 listens at the address alone, or at JAX_COORDINATOR_BIND_ADDRESS. From here on an uncaught exception
    ends the process at once, and the others end within a second of any process that ends (`peers`).

    Args:
      address: host and port of process 0, such as `"10.0.0.1:8476"`.
      index: this one's, from 0.
      start_seconds: for the others to start.
      heartbeat_seconds: after how long a silent process counts as gone to JAX, and the others end.

    Raises:
      UserError: only some of the three are given, they make no sense, nobody says who the others are, or one of
        them does not start.
    """
    from cait_jax.peers import Peers
    from cait_jax.rendezvous import meet

    global _peers
    given = (address, count, index)
    devices = None
    if given == (None, None, None):
        address, count, index, devices = _found_by_jax(round(start_seconds))
    if address is None or count is None or index is None:
        raise UserError(
            "--coordinator=HOST:PORT, --processes=N and --process=I belong together: give all three, or "
            "--distributed alone where Slurm, Open MPI or a TPU pod knows them"
        )
    host, port = _host_and_port(address)
    if port is None or not 0 <= index < count <= _MOST_PROCESSES:
        raise UserError(
            f"--coordinator={address} --processes={count} --process={index} do not do: the first is a "
            "host and a port from 1 to 65535, such as 10.0.0.1:8476, and the last counts from 0"
        )
    bind = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS")
    meeting = meet(
        host, port, count, index, start_seconds, bind=_host_and_port(bind)[0] if bind else None
    )
    name = Path(sys.argv[0]).name
    _peers = Peers(meeting, index=index, end=lambda sentence: leave(1, f"{name}: {sentence}"))
    # JAX would end the process by an abort.
    late = threading.Timer(
        start_seconds,
        leave,
        (
            1,
            f"not all processes of the run have started within {start_seconds:.0f} s: see which did not",
        ),
    )
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            _peers.address,
            count,
            index,
            local_device_ids=devices,
            coordinator_bind_address=_peers.bind_address,
            heartbeat_timeout_seconds=heartbeat_seconds,
            initialization_timeout=round(start_seconds) + 60,
        )
    finally:
        late.cancel()
    _exit_on_uncaught_exceptions()


def peers() -> "Peers | None":
    """The processes that this one has joined."""
    return _peers


def _found_by_jax(seconds: int) -> tuple[str, int, int, Any]:
    """Address, count, index and local devices, from a cluster's variables."""
    # No public interface gives them without connecting.
    from jax._src.clusters import ClusterEnv

    address, count, index, devices = ClusterEnv.auto_detect_unset_distributed_params(
        os.environ.get("JAX_COORDINATOR_ADDRESS"), None, None, None, None, seconds
    )
    if address is None or count is None or index is None:
        raise UserError(
            "nothing here says who the other processes are (no Slurm step, no Open MPI up to 4, no TPU pod): give "
            "--coordinator=HOST:PORT, --processes=N and --process=I"
        )
    return address, count, index, devices


def _host_and_port(address: str) -> tuple[str, int | None]:
    """The parts of an address; no port if it is none. Brackets around the host are left out."""
    host, _, port = address.rpartition(":")
    plain = re.fullmatch(r"[\w.-]+|\[[0-9a-fA-F:.%\w]+\]", host) and re.fullmatch(
        "[0-9]{1,5}", port
    )
    known = plain and 1 <= int(port) <= 65535
    return host.strip("[]"), int(port) if known else None


def _exit_on_uncaught_exceptions() -> None:
    """At its exit Python would wait for the other processes, which wait for this one's next step."""
    report = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and (sentence := _of_other_process(error)) is not None:
            leave(1, sentence)
        report(kind, error, traceback)
        if in_main:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    sys.excepthook = hook


def check_shared(workdir: Path) -> None:
    """Refuses a workdir that is not one folder for all processes: they would wait for ever in the first save.

    Raises:
      UserError: naming the processes that do not see what process 0 writes.
    """
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(secrets.randbits(32))))
    mark = workdir / f".shared-{token}"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("a mark in the workdir")
    seen = multihost_utils.process_allgather(np.array(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        blind = ", ".join(str(index) for index in np.flatnonzero(~seen))
        raise UserError(
            f"{workdir.absolute()} is not the same folder in all processes (process {blind} does not see what "
            "process 0 writes): give a --workdir on a file system that all machines share"
        )
