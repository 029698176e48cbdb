"""One run in several processes: how they find each other, and end together."""

import os
import secrets
import sys
import threading
from pathlib import Path
from types import TracebackType

import jax
import numpy as np
from jax.experimental import multihost_utils

from cait_jax.errors import UserError


def join_processes(
    *,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Connects this process with the others of its run. To be called before JAX is used.

    Without arguments they are found as JAX finds them: on TPU pods, in Slurm steps and under Open MPI up to 4.
    From here on an uncaught exception ends the process at once, and so, soon after, the others.

    Args:
      address: host and port of process 0, such as `"10.0.0.1:8476"`.
      index: this one's, from 0.
      heartbeat_seconds: after how long a silent process counts as gone, and the others end.

    Raises:
      UserError: only some of the three are given, they make no sense, or nobody says who the others are.
    """
    given = (address, count, index)
    if given != (None, None, None):
        if address is None or count is None or index is None:
            raise UserError(
                "--coordinator=HOST:PORT, --processes=N and --process=I belong together: give all three, or "
                "--distributed alone where Slurm, Open MPI or a TPU pod knows them"
            )
        if ":" not in address or not 0 <= index < count:
            raise UserError(
                f"--coordinator={address} --processes={count} --process={index} do not do: the first is a "
                "host and a port, such as 10.0.0.1:8476, and the last counts from 0"
            )
    try:
        jax.distributed.initialize(
            address,
            count,
            index,
            # JAX's default binds every interface.
            coordinator_bind_address=address if index == 0 else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        raise UserError(
            "nothing here says who the other processes are (no Slurm step, no Open MPI up to 4, no TPU pod): give "
            f"--coordinator=HOST:PORT, --processes=N and --process=I ({error})"
        ) from error
    _exit_on_uncaught_exceptions()


def _exit_on_uncaught_exceptions() -> None:
    """At its exit Python would wait for the other processes, which wait for this one's next step."""
    report = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        report(kind, error, traceback)
        if threading.current_thread() is threading.main_thread():
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
