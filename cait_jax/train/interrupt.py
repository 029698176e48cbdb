"""Ctrl-C and SIGTERM as a wish to stop after the step at hand."""

import signal
import threading
from types import FrameType
from typing import Any


class StopRequest:
    """While entered, turns the first SIGINT or SIGTERM into `requested`; a second one acts as ever.

    Outside the main thread Python allows no handlers, and this does nothing.
    """

    def __init__(self) -> None:
        """Nothing is requested yet."""
        self.requested = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        """Installs the handlers."""
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Puts the earlier handlers back."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
