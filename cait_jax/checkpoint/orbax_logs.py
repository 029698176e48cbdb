"""What Orbax prints of a save that fails: nothing, as the exception that it raises becomes one sentence."""

import asyncio.base_events
import functools
import itertools
import logging
import sys
import traceback
from pathlib import Path
from typing import Any

import orbax.checkpoint

_ORBAX = str(Path(orbax.checkpoint.__file__).parent)
_EVENT_LOOP = asyncio.base_events.__file__


@functools.cache
def quiet_errors() -> None:
    """Drops errors that come from Orbax, with their tracebacks; its warnings and other libraries' errors stay.

    They come from its logger, from asyncio, of tasks whose exception nobody fetches once another has ended the
    save, and from TensorStore's threads, whose results come after the event loop was closed.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_not_orbax)
    report = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        trace = unraisable.exc_traceback
        called_by_asyncio = trace is not None and trace.tb_frame.f_code.co_filename == _EVENT_LOOP
        if not called_by_asyncio or str(unraisable.exc_value) != "Event loop is closed":
            report(unraisable)

    sys.unraisablehook = hook


def _is_not_orbax(record: logging.LogRecord) -> bool:
    if not logging.ERROR <= record.levelno < logging.CRITICAL:
        return True
    raised = traceback.walk_tb(record.exc_info[2] if record.exc_info else None)
    files = (frame.f_code.co_filename for frame, _ in raised)
    return not any(file.startswith(_ORBAX) for file in itertools.chain([record.pathname], files))
