"""The runs of a sweep, each in a process of its own.

OUT/NAME is the workdir of a run and OUT/NAME.log its output. A process ends, saving its checkpoint, when its
standard input does: that of a sweep that is stopped, and of one that is killed.
"""

import contextlib
import functools
import glob
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from cait_jax.errors import UserError, config_flags, one_line, quiet_libraries, speaking
from cait_jax.files import LOCK, DirectoryLock
from cait_jax.processes import end_program
from cait_jax.train.config import load_config
from cait_jax.train.sweep.results import append_row, read_rows, row_of
from cait_jax.train.sweep.settings import SweepRun

_RELEASED_WITHIN_S = 120.0  # a workdir, by a process whose sweep was killed

# What is next, given the rows of finished runs by digest; None at the end.
Ask = Callable[[Mapping[str, Mapping[str, Any]]], SweepRun | None]


@runtime_checkable
class Events(Protocol):
    """What a sweep reports; calls come from several threads, one at a time."""

    def began(self, run: SweepRun) -> None:
        """A process was started."""

    def progress(self, run: SweepRun, line: str) -> None:
        """The last line of its output, every `progress_s` seconds."""

    def finished(self, run: SweepRun, row: Mapping[str, Any]) -> None:
        """It finished."""

    def failed(self, run: SweepRun, reason: str) -> None:
        """It failed."""


def run_sweep(
    file: str, ask: Ask, out: Path, *, events: Events, jobs: int = 1, progress_s: float = 30.0
) -> list[dict[str, Any]]:
    """Trains what `ask` gives, `jobs` at a time, and returns the rows of all finished runs in `out`.

    Runs at a time share the cores evenly, and take a GPU each where there are any.

    Raises:
      KeyboardInterrupt: after every process has saved and ended.
      UserError: another sweep is running in `out`.
    """
    out.mkdir(parents=True, exist_ok=True)
    sweep = _Sweep(file, ask, out, jobs, events, progress_s)
    with (
        DirectoryLock(out, option="--out"),
        ThreadPoolExecutor(jobs) as pool,
        _interrupted_by_sigterm(),
    ):
        futures = [pool.submit(sweep.work, place) for place in range(jobs)]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            sweep.stop()
            raise
    return list(sweep.rows.values())


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Sweep:
    def __init__(
        self, file: str, ask: Ask, out: Path, jobs: int, events: Events, progress_s: float
    ) -> None:
        self._file, self._ask, self._out, self._jobs = file, ask, out, jobs
        self._events, self._progress_s = events, progress_s
        self._path = out / "runs.jsonl"
        self.rows = read_rows(self._path)
        self._lock = threading.Lock()
        self._stopped = False
        self._processes: set[subprocess.Popen[bytes]] = set()

    def work(self, place: int) -> None:
        """Trains one run after another."""
        while True:
            with self._lock:
                run = None if self._stopped else self._ask(self.rows)
                if run is None:
                    return
                process = self._start(run, place)
                self._processes.add(process)
                self._events.began(run)
            start = time.monotonic()
            status = self._wait(run, process)
            with self._lock:
                self._processes.discard(process)
                if process.stdin:
                    process.stdin.close()
                if status == 0:
                    row = row_of(run, self._out / run.name, time.monotonic() - start)
                    append_row(self._path, row)
                    self.rows[run.digest] = row
                    self._events.finished(run, row)
                elif self._stopped:
                    return
                elif status in (130, -signal.SIGINT):
                    self._events.failed(run, "it was stopped by a signal")
                else:
                    self._events.failed(
                        run, self._last_line(run) or f"it ended with status {status}"
                    )

    def stop(self) -> None:
        """Starts no more, and has the others save and end, for which the pool waits."""
        with self._lock:
            self._stopped = True
            for process in self._processes:
                if process.stdin:
                    process.stdin.close()

    def _start(self, run: SweepRun, place: int) -> subprocess.Popen[bytes]:
        settings = [f"{key}={text}" for key, text in run.overrides.items()]
        module = "cait_jax.train.sweep.runs"
        command = [sys.executable, "-m", module, self._file, str(self._out / run.name), *settings]
        with (self._out / f"{run.name}.log").open("ab") as stream:
            return subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=stream,
                stderr=subprocess.STDOUT,
                env={**os.environ, **_share(place, self._jobs)},
                start_new_session=True,  # Ctrl-C reaches it once, through `stop`
            )

    def _wait(self, run: SweepRun, process: subprocess.Popen[bytes]) -> int:
        while True:
            try:
                return process.wait(self._progress_s)
            except subprocess.TimeoutExpired:
                with self._lock:
                    if (line := self._last_line(run)) and not self._stopped:
                        self._events.progress(run, line)

    def _last_line(self, run: SweepRun) -> str:
        with (self._out / f"{run.name}.log").open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**14))
            lines = file.read().decode(errors="replace").strip().splitlines()
        return one_line(lines[-1]) if lines else ""


def _share(place: int, jobs: int) -> dict[str, str]:
    """Environment variables of a run beside others: a GPU of its own, and its part of the cores."""
    if jobs == 1:
        return {}
    found = {"CAIT_SWEEP_PLACE": f"{place}/{jobs}"}
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = given.split(",") if given else glob.glob("/proc/driver/nvidia/gpus/*")  # noqa: PTH207
    if gpus:
        found["CUDA_VISIBLE_DEVICES"] = gpus[place % len(gpus)] if given else str(place % len(gpus))
    return found


# In the process of a run


def _take_cores() -> None:
    """Bounds this process to its part of the cores, where the system can."""
    place, _, jobs = os.environ.get("CAIT_SWEEP_PLACE", "").partition("/")
    if jobs and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        own = cores[int(place) :: int(jobs)] or [cores[int(place) % len(cores)]]
        os.sched_setaffinity(0, own)


def _stop_with_the_sweep() -> None:
    def watch() -> None:
        while os.read(0, 1):  # nothing is sent: it returns at the end
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, name="end of the sweep", daemon=True).start()


def _wait_until_free(workdir: Path) -> None:
    """Waits for a process whose sweep was killed, and which is saving its checkpoint."""
    deadline = time.monotonic() + _RELEASED_WITHIN_S
    while (workdir / LOCK).exists() and time.monotonic() < deadline:
        try:
            with DirectoryLock(workdir):
                return
        except UserError:
            time.sleep(0.1)


def _main(file: str, workdir: str, *settings: str) -> int:
    """One run, as `train.py` makes it."""
    _take_cores()
    from cait_jax.cores import use_cores
    from cait_jax.train import train
    from cait_jax.train.setup import mesh_fits

    config = load_config(file, dict(text.split("=", 1) for text in settings))
    use_cores(functools.partial(mesh_fits, config))
    _wait_until_free(Path(workdir))
    return 0 if train(config, workdir).finished else 130


if __name__ == "__main__":
    _stop_with_the_sweep()
    quiet_libraries()
    with speaking(config_flags):
        try:
            status = _main(*sys.argv[1:])
        except BaseException as error:
            from cait_jax.train import NonFiniteError

            end_program("train", error, (UserError, NonFiniteError))
    sys.exit(status)
