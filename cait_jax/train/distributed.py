"""One run in several processes: how they find each other, and how none waits for ever for one that is gone."""

import contextlib
import os
import re
import secrets
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from cait_jax.errors import UserError, printable, writable

_GLOB = "*?[]" if os.sep == "\\" else "*?[]\\"


def join_processes(
    *,
    address: str | None = None,
    count: int | None = None,
    index: int | None = None,
    heartbeat_seconds: int = 100,
) -> None:
    """Connects this process with the others of its run. To be called before JAX is used.

    Without arguments they are found as JAX finds them: on TPU pods, in Slurm steps and under Open MPI up to 4.

    Args:
      address: host and port of process 0, such as `"10.0.0.1:8476"`.
      count: the number of processes.
      index: this one's, from 0.
      heartbeat_seconds: after how long a silent process counts as gone, and the others end.

    Raises:
      UserError: only some of the three are given, they make no sense, or nobody says who the others are.
    """
    given = (address, count, index)
    explicit = None not in given
    if not explicit and given != (None, None, None):
        raise UserError(
            "--coordinator=HOST:PORT, --processes=N and --process=I belong together: give all three, or "
            "--distributed alone where Slurm, Open MPI or a TPU pod knows them"
        )
    if explicit:
        assert address is not None
        assert count is not None
        assert index is not None
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
            # Of all interfaces JAX would take every one.
            coordinator_bind_address=address if index == 0 else None,
            heartbeat_timeout_seconds=heartbeat_seconds,
        )
    except ValueError as error:
        raise UserError(
            "nothing here says who the other processes are (no Slurm step, no Open MPI up to 4, no TPU pod): give "
            f"--coordinator=HOST:PORT, --processes=N and --process=I ({error})"
        ) from error


def run_folder_name(name: str) -> str:
    """The name with `_` for what Orbax cannot have in a path: a pattern's letters, and what is not UTF-8."""
    return re.sub(f"[{re.escape(_GLOB)}]", "_", name if writable(name) == name else printable(name))


def local_folder(workdir: str | Path) -> Path:
    """The folder of a run.

    Raises:
      UserError: it is an address of a bucket, which `Path` would make a local folder of; or its path is one that
        Orbax writes checkpoints to which it does not find again.
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
    return Path(workdir)


def check_shared(workdir: Path) -> None:
    """Refuses a workdir that is not one folder for all processes: they would wait for ever in the first save.

    Args:
      workdir: a folder that is there.

    Raises:
      UserError: naming the processes that do not see what process 0 writes.
    """
    if jax.process_count() == 1:
        return
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


@contextlib.contextmanager
def ends_for_all() -> Iterator[None]:
    """Inside, an exception in one of several processes ends it at once, and so, soon after, the others.

    Python's own way out waits for the others to say goodbye, and they wait for this one's next step.
    """
    try:
        yield
    except BaseException as error:
        if jax.process_count() == 1:
            raise
        if isinstance(error, SystemExit) and not error.code:
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        elif not isinstance(error.code, int):
            print(error.code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        code = error.code if isinstance(error, SystemExit) else 1
        os._exit(code if isinstance(code, int) else 1)
