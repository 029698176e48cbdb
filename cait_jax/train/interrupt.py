"""Ctrl-C and SIGTERM as a wish to stop after the step at hand."""

import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """While entered, turns the first SIGINT or SIGTERM into a request; a second one acts as ever.

    Of several processes each may be told, and all must stop after the same step. JAX agrees on it, with a SIGTERM
    handler of its own, beside which Python's would silently do nothing or undo it. So there only SIGTERM counts.

    Outside the main thread Python allows no handlers, and this does nothing.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self._requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Installs the handlers."""
        alone = jax.process_count() == 1
        if alone and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the earlier handlers back."""
        self._restore()

    def reached(self, step: int) -> bool:
        """Whether to stop after this step: the same answer in every process.

        Args:
          step: every process must ask for every step.
        """
        if jax.process_count() > 1:
            return bool(multihost_utils.reached_preemption_sync_point(step))
        return self._requested

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
