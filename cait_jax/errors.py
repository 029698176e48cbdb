"""Mistakes of the user: one sentence that says how to mend them, in the words of the interface in use.

A setting is an argument of the Python API (`"reset_head"`) or a config key (`"config.optimizer.learning_rate"`).
`setting` and `advise` write it as the user does: `reset_head=True` in Python, `--config.init.reset_head=True`
under `train.py`, and in a command as its option, if it has one.
"""

import contextlib
import dataclasses
import difflib
import logging
import os
import re
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from cait_jax.renamed import KEY_OF

# Control characters (C0, DEL, C1), line and paragraph separators, bidirectional overrides, surrogates.
_CONTROL = "\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
_SURROGATES = "\ud800-\udfff"


class UserError(ValueError):
    """A mistake of the caller's. The message is one sentence that says how to mend it; it is `printable`."""

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message)))


class StorageError(UserError):
    """A write that failed, of something that may be written later: no room, or storage that is away."""


# Names in sentences


def printable(text: str, *, keep: str = "") -> str:
    r"""Escapes what a terminal would obey or cannot show as `\xNN` or `\uNNNN`, except the characters in `keep`.

    These are control characters, bidirectional overrides (Unicode TR 36) and surrogates; a byte of a file name
    that is not UTF-8 (PEP 383) becomes `\xNN`. Idempotent.
    """

    def escape(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        if 0xDC80 <= code <= 0xDCFF:
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return re.sub(f"[{_CONTROL}{_SURROGATES}]", escape, text)


def writable(text: str) -> str:
    """Escapes what no encoding holds: the bytes of file names that are not UTF-8, and other surrogates."""
    return re.sub(f"[{_SURROGATES}]", lambda match: printable(match[0]), text)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared: file systems differ in it."""
    return unicodedata.normalize("NFC", name)


def one_line(text: str) -> str:
    """`text` without line breaks; of a long one the beginning and the end, where the cause is."""
    line = " ".join(text.split()).rstrip(".")
    return line if len(line) <= 300 else f"{line[:100]} ... {line[-200:]}"


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """The end of a sentence: `"nearest: a, b"`, or, where nothing is alike, `"known: ..."` with up to 40 names."""
    known = sorted(map(printable, names))
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {some(known, 40)}"


def some(names: Sequence[str], count: int = 4) -> str:
    """The first `count` of many: `"a, b, c, d and 6 more"`."""
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


# Settings in sentences

CONFIG = "config."
UNSPECIFIED = object()
# From a setting and its value, or `UNSPECIFIED`, to how it is written; None where it cannot be set.
Interface = Callable[[str, Any], str | None]


@dataclasses.dataclass(frozen=True)
class Literal:
    """A value that stands for what the user fills in, such as `PATH`; written without quotes."""

    text: str

    def __repr__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Way:
    """One way out of an error; `text` has `{}` for the setting, such as `"give {} to start the head anew"`."""

    text: str
    setting: str
    value: Any = UNSPECIFIED

    def __str__(self) -> str:
        return self.text.format(setting(self.setting, self.value))


def python_arguments(name: str, value: Any) -> str | None:
    """`name=value`. Config keys are written as `train.py` has them."""
    if name.startswith(CONFIG):
        return config_flags(name, value)
    return name if value is UNSPECIFIED else f"{name}={value!r}"


def config_flags(name: str, value: Any) -> str | None:
    """`--config.KEY=VALUE`, of `train.py` and `cait plan`."""
    name = KEY_OF.get(name, name)
    if not name.startswith(CONFIG):
        return None
    return f"--{name}" if value is UNSPECIFIED else f"--{name}={value}"


_current: Interface = python_arguments


@contextlib.contextmanager
def speaking(interface: Interface) -> Iterator[None]:
    """Inside, messages are for users of `interface`, in the whole process: threads raise errors as well."""
    global _current
    before, _current = _current, interface
    try:
        yield
    finally:
        _current = before


def in_python() -> bool:
    """Whether the user calls the Python API."""
    return _current is python_arguments


def can_set(name: str) -> bool:
    """Whether the user has this setting."""
    return _current(name, UNSPECIFIED) is not None


def setting(name: str, value: Any = UNSPECIFIED) -> str:
    """How the user writes a setting; where it cannot be set, its name in words."""
    return _current(name, value) or name.rpartition(".")[2].replace("_", " ")


def advise(*ways: Way | str, otherwise: str = "") -> str:
    """The ways out that the user has, joined by "or", a string being open to everybody; else `otherwise`."""
    open_ways = [str(way) for way in ways if isinstance(way, str) or can_set(way.setting)]
    return ", or ".join(open_ways) or otherwise


# Logs and the reports of threads, which would follow the sentence that ends a program


def quiet_libraries() -> None:
    """Drops libraries' error logs, and what Python prints of exceptions that nobody can catch."""
    for name in ("absl", "asyncio"):  # Orbax, Grain and TFDS log through absl what they raise too
        # A filter, as absl's flags set the level again.
        logging.getLogger(name).addFilter(lambda record: record.levelno >= logging.CRITICAL)
    logging.getLogger("jax").setLevel(logging.WARNING)  # backends that are not here, at INFO
    # Of the process that clears up after killed workers, which is started with these options.
    sys.warnoptions.append("ignore:resource_tracker:UserWarning")
    sys.unraisablehook = _drop_but_interrupts
    sys.excepthook = _print_of_main_thread


def _drop_but_interrupts(unraisable: "sys.UnraisableHookArgs") -> None:
    """Drops what nobody can catch, but sends a Ctrl-C again: JAX has a callback in garbage collection."""
    if unraisable.exc_type is KeyboardInterrupt:
        # Later and from another thread: here it would be raised, and lost, at once.
        again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        again.daemon = True
        with contextlib.suppress(RuntimeError):  # the interpreter ends, and starts no thread
            again.start()


def _print_of_main_thread(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    """Python's own hook, but not for exceptions in the threads of C++ libraries."""
    if threading.current_thread() is threading.main_thread():
        sys.__excepthook__(kind, error, traceback)
