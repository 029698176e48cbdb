"""Training runs as child processes: started, watched, and looked for after their end.

`train.py` is imported once, without a device; each run is a fork that executes its `program()`, so that a trial
does not spend its time on imports. `fresh=True` starts `python train.py` instead.
"""

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0  # a worker that its run was still starting ends once it has started

_PR_SET_CHILD_SUBREAPER = 36
_CLONE_NEWNS = 0x20000

Hook = Callable[[], None]


class Child:
    """One process of a run.

    Attributes:
      pid: its number.
      log: the file of its standard output and error.
      status: the exit status, negative for a signal; None while it runs.
      ended: when it was found to have ended, in seconds of the monotonic clock.
    """

    def __init__(self, pid: int, log: Path) -> None:
        self.pid, self.log = pid, log
        self.status: int | None = None
        self.ended = 0.0

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.status is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.status, self.ended = os.waitstatus_to_exitcode(status), time.monotonic()
        return self.status

    def send(self, number: int) -> None:
        """Sends a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def said(self) -> str:
        """What it wrote to standard output and error."""
        return self.log.read_text(errors="replace")


def wait(children: Iterable[Child], seconds: float) -> bool:
    """Waits for the end of all; whether it came in time."""
    children = list(children)
    deadline = time.monotonic() + seconds
    while [child for child in children if child.poll() is None]:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


class Launcher:
    """Starts runs and finds what they leave behind.

    Attributes:
      cache: JAX's compilation cache, which runs that nobody disturbs fill.
      private: whether this process has mounts of its own, /dev/shm among them, which needs root.
    """

    def __init__(self, out: Path) -> None:
        self.cache = out.absolute() / "cache"
        self._temporary = out.absolute() / "tmp"
        for folder in (self.cache, self._temporary):
            folder.mkdir(parents=True, exist_ok=True)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # orphans become ours
        self.private = libc.unshare(_CLONE_NEWNS) == 0
        if self.private:
            subprocess.run(["mount", "--make-rprivate", "/"], check=True)
            subprocess.run(["mount", "-t", "tmpfs", "tmpfs", "/dev/shm"], check=True)
        self._segments = set(os.listdir("/dev/shm"))  # noqa: PTH208
        self._helpers: set[int] = set()

    def call_in_fork(self, loop: Callable[[Connection], None]) -> Connection:
        """Runs `loop` in a fork that belongs to the benchmark, not to a run; the other end of its pipe."""
        ours, theirs = Pipe()
        pid = os.fork()
        if pid == 0:
            ours.close()
            try:
                loop(theirs)
            except EOFError:
                pass
            except BaseException:
                traceback.print_exc()
            os._exit(0)
        theirs.close()
        self._helpers.add(pid)
        return ours

    def start(
        self,
        options: Sequence[str],
        log: Path,
        *,
        processes: int = 1,
        devices: int = 1,
        hooks: Mapping[int, Hook] | None = None,
        only: Iterable[int] | None = None,
        fresh: bool = False,
        fill_cache: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> list[Child]:
        """Starts `train.py` with options, in a process group of its own.

        Args:
          options: of every process.
          log: receives what they say; with the number of the process appended.
          processes: of the run, which find each other on a free port.
          devices: simulated ones, of each process.
          hooks: what each process calls before it begins, by its number.
          only: which of them to start.
          fresh: start Python anew instead of forking; without hooks.
          fill_cache: write to the compilation cache; a process that may be killed should not.
        """
        group, children = 0, []
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = f"127.0.0.1:{free.getsockname()[1]}"
        settings = {
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(self.cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0" if fill_cache else "1e9",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "TMPDIR": str(self._temporary),
            "PYTHONPATH": str(ROOT),
            **(environment or {}),
        }
        sys.stdout.flush()
        for index in range(processes) if only is None else only:
            arguments = list(options)
            if processes > 1:
                arguments += [f"--coordinator={address}", f"--processes={processes}"]
                arguments.append(f"--process={index}")
            path = log.with_name(f"{log.name}.{index}")
            pid = os.fork()
            if pid == 0:
                hook = (hooks or {}).get(index)
                _become(arguments, path, settings, hook, group, fresh)
            with contextlib.suppress(PermissionError, ProcessLookupError):
                os.setpgid(pid, group or pid)
            group = group or pid
            children.append(Child(pid, path))
        return children

    def leftovers(self, own: Iterable[Child] = ()) -> list[str]:
        """Processes, temporary files and shared memory that are there after a trial; they are removed."""
        del own
        deadline = time.monotonic() + PATIENCE_S
        while (alive := self._descendants()) and time.monotonic() < deadline:
            time.sleep(0.02)
        found = [f"process {pid} ({name}) was left" for pid, name in alive.items()]
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        for path in self._temporary.iterdir():
            found.append(f"temporary {path.name} was left")
            subprocess.run(["rm", "-rf", str(path)], check=True)
        segments = set(os.listdir("/dev/shm")) - self._segments  # noqa: PTH208
        found += [f"shared memory {name} was left" for name in sorted(segments)]
        for name in segments:
            with contextlib.suppress(OSError):
                Path("/dev/shm", name).unlink()
        return found

    def _descendants(self) -> dict[int, str]:
        """Living processes below this one but helpers, by number; those that have ended are reaped."""
        parents: dict[int, tuple[int, str, str]] = {}
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                before, _, after = path.read_text().rpartition(")")
                state, parent = after.split()[:2]
                parents[int(path.parent.name)] = int(parent), state, before.partition("(")[2]
        found: dict[int, str] = {}
        level = {os.getpid()}
        while level:
            level = {pid for pid, (parent, *_) in parents.items() if parent in level}
            level -= self._helpers
            for pid in level:
                if parents[pid][1] == "Z":
                    with contextlib.suppress(ChildProcessError):
                        os.waitpid(pid, os.WNOHANG)
                else:
                    found[pid] = parents[pid][2]
        return found


def _become(
    arguments: list[str],
    log: Path,
    settings: Mapping[str, str],
    hook: Hook | None,
    group: int,
    fresh: bool,
) -> None:
    """Turns a fork into one process of a run; never returns."""
    status = 1
    try:
        os.setpgid(0, group)
        os.environ.update(settings)
        null = os.open(os.devnull, os.O_RDONLY)
        stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for target, source in ((0, null), (1, stream), (2, stream)):
            os.dup2(source, target)
        os.chdir(ROOT)
        if fresh:
            program = [sys.executable, str(ROOT / "train.py"), *arguments]
            os.execve(sys.executable, program, os.environ)
        status = _program(arguments, settings, hook)
    except KeyboardInterrupt:
        status = 130
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _program(arguments: list[str], settings: Mapping[str, str], hook: Hook | None) -> int:
    """What `python train.py` does after its imports; gives the exit status."""
    import jax

    import train

    tempfile.tempdir = None  # $TMPDIR is read anew
    sys.argv = ["train.py", *arguments]
    for name, value in settings.items():  # JAX has read the environment
        option = name.lower()
        if option.startswith("jax_") and hasattr(jax.config, option):
            jax.config.update(option, _value(value))
    _write_cache_from_every_process()
    if hook is not None:
        hook()
    status: Any = 1
    try:
        status = train.program()
    except SystemExit as end:
        status = 0 if end.code is None else end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    return status if isinstance(status, int) else 1


def _write_cache_from_every_process() -> None:
    """JAX writes programs to its cache from process 0 alone, and the others' have other keys on CPUs."""
    from jax._src import compiler, distributed

    real = compiler._cache_write

    def write(*args: Any, **kwargs: Any) -> Any:
        state = distributed.global_state
        index, state.process_id = state.process_id, 0
        try:
            return real(*args, **kwargs)
        finally:
            state.process_id = index

    compiler._cache_write = write


def _value(text: str) -> Any:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text
