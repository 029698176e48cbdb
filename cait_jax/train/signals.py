"""Signals to a run: SIGINT and SIGTERM stop it after a step, SIGUSR1 asks for a checkpoint."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import jax
from jax.experimental import multihost_utils


@contextlib.contextmanager
def stop_signal() -> Iterator[Callable[[int], bool]]:
    """Yields whether to stop after a step, the same in every process; to be asked at every step.

    The first SIGINT or SIGTERM requests it; a second acts as usual. On the same step several processes agree by
    JAX's preemption service, whose SIGTERM handler Python's would disable: SIGINT is passed on to it as SIGTERM.
    """
    if jax.process_count() > 1:
        with _handling(_pass_on, signal.SIGINT):
            yield lambda step: bool(multihost_utils.reached_preemption_sync_point(step))
        return
    requested = threading.Event()
    with contextlib.ExitStack() as handlers:

        def handle(number: int, frame: FrameType | None) -> None:
            requested.set()
            handlers.close()

        handlers.enter_context(_handling(handle, signal.SIGINT, signal.SIGTERM))
        yield lambda step: requested.is_set()


@contextlib.contextmanager
def save_signal() -> Iterator[Callable[[], bool]]:
    """Yields whether SIGUSR1, which Slurm sends before it preempts, has asked for a checkpoint since last asked.

    Several processes cannot agree on a step to save and go on: there it is passed on as SIGTERM, and all stop.
    """
    if jax.process_count() > 1:
        with _handling(_pass_on, signal.SIGUSR1):
            yield lambda: False
        return
    requested: list[int] = []
    with _handling(lambda number, frame: requested.append(number), signal.SIGUSR1):
        yield lambda: bool(requested) and bool(requested.pop(0))


def _pass_on(number: int, frame: FrameType | None) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _handling(
    handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals
) -> Iterator[None]:
    """Handles signals, but outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, before in previous.items():
            signal.signal(number, before)
