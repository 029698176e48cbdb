"""How a program ends: a mistake of its user's is one sentence, and that the last line of standard error.

Libraries write there too: logs with tracebacks, from threads and from C++, until the process is gone. Their error
logs are dropped, as what happened reaches us as an exception, and nothing is written after the sentence.
"""

import contextlib
import errno
import logging
import multiprocessing
import os
import sys
import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

from cait_jax.checkpoint.seal import one_line
from cait_jax.errors import printable
from cait_jax.interface import Way, advise

# Whose errors reach the program as exceptions as well: Orbax, Grain and TFDS log through absl.
_NOISY = ("absl", "asyncio")
_PATIENCE_S = 2.0
# Refusals of the file system that no program can foresee, and their remedy.
_REFUSALS = {
    errno.ENOSPC: "make room, or choose another place",
    errno.EDQUOT: "make room, or choose another place",
    errno.EFBIG: "make room, or choose another place",
    errno.EACCES: "change its permissions, or choose another place",
    errno.EPERM: "change its permissions, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOENT: "check the path, or choose another place",
    errno.EIO: "check the disk, or choose another place",
    errno.ESTALE: "mount it again, or choose another place",
    errno.ELOOP: "choose another place",
    errno.ENOTDIR: "choose another place",
    errno.EEXIST: "choose another place",
    errno.EISDIR: "give a file",
    errno.ENAMETOOLONG: "choose a shorter name",
}


def quiet_libraries() -> None:
    """Drops what libraries log of errors, and exceptions that Python would print because nobody can catch them."""
    for name in _NOISY:  # a filter, as absl's flags set the level again
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.CRITICAL)
    # Of the process that clears up after killed workers, which is started with these options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    sys.unraisablehook = lambda _: None
    sys.excepthook = _only_of_python


def sentence(error: BaseException) -> str | None:
    """What to tell the user of a refusal by the file system or of too little memory; None for any other error."""
    if isinstance(error, OSError) and error.errno in _REFUSALS:
        reason = (error.strerror or os.strerror(error.errno)).lower()
        where = f"{error.filename}: " if error.filename is not None else ""
        return f"{where}{reason}; {_REFUSALS[error.errno]}"
    exhausted = isinstance(error, RuntimeError) and "RESOURCE_EXHAUSTED" in str(error)
    if exhausted or isinstance(error, MemoryError):
        ways = advise(
            Way("lower {}", "batch_size"), Way("lower {}", "image_size"), "use a smaller model"
        )
        return f"there is too little memory ({one_line(str(error))}): {ways}"
    return None


def settle() -> None:
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


def leave(code: int, last: str | None = None) -> NoReturn:
    """Ends the process now, `last` being the last line of standard error."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    settle()
    with contextlib.suppress(OSError):
        stderr = os.dup(2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # from here on others write there
        if last is not None:
            encoding = sys.stderr.encoding or "utf-8"
            os.write(stderr, f"{printable(last)}\n".encode(encoding, errors="backslashreplace"))
    os._exit(code)


def run(name: str, main: Callable[[], object], errors: tuple[type[Exception], ...]) -> int:
    """Runs a program. It ends in here if it fails by a mistake of the user's.

    Args:
      name: of the program, which begins the sentence.
      main: the program.
      errors: exceptions that are a sentence. Any other is a defect and passes, with its traceback.

    Returns:
      The exit status: what `main` returns or exits with.
    """
    quiet_libraries()
    try:
        status = main()
    except errors as error:
        leave(1, f"{name}: {error}")
    except SystemExit as end:
        if isinstance(end.code, str):
            leave(1, end.code)
        status = end.code
    except KeyboardInterrupt:
        leave(130)
    except Exception as error:
        said = sentence(error)
        if said is None:
            raise
        leave(1, f"{name}: {said}")
    return status if isinstance(status, int) else 0


def _only_of_python(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Python's own hook, but not for exceptions in the threads of C++ libraries."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, traceback)
