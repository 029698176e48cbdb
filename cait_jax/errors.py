"""What the package says when its caller made a mistake: one sentence, with the fix in it."""

import difflib
import re
import unicodedata
from collections.abc import Iterable, Sequence

# Control characters (C0, DEL, C1), line and paragraph separators, overrides of the writing direction, surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_SURROGATES = re.compile("[\ud800-\udfff]")


class UserError(ValueError):
    """A mistake of the caller's. The message is one sentence that says how to mend it; it is `printable`."""

    def __init__(self, message: object = "") -> None:
        """Takes the sentence, whatever names of files and classes it holds."""
        super().__init__(printable(str(message)))


def printable(text: str, *, keep: str = "") -> str:
    r"""Escapes what a terminal would obey or cannot show, as `\xNN` or `\uNNNN`.

    These are control characters, bidirectional overrides (Unicode TR 36) and surrogates; a byte of a file name
    that is not UTF-8 (PEP 383) becomes `\xNN`. All else stays, so the function may be applied twice.

    Args:
      text: names, or what holds names.
      keep: characters to leave, such as a line feed between lines.
    """

    def escaped(match: re.Match[str]) -> str:
        code = ord(match[0])
        if match[0] in keep:
            return match[0]
        if 0xDC80 <= code <= 0xDCFF:
            code -= 0xDC00
        return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"

    return _UNPRINTABLE.sub(escaped, text)


def writable(text: str) -> str:
    """Escapes what no encoding holds: the bytes of file names that are not UTF-8, and other surrogates."""
    return _SURROGATES.sub(lambda match: printable(match[0]), text)


def composed(name: str) -> str:
    """A name in Unicode's composed form (NFC), in which names are compared: file systems differ in it."""
    return unicodedata.normalize("NFC", name)


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Names the members of `names` most like `name`, as the end of a sentence.

    Args:
      name: what was asked for.
      names: what exists.
      count: how many to name at most.

    Returns:
      `"nearest: a, b"`, or, where nothing is alike, `"known: ..."` with every name.
    """
    known = sorted(map(printable, names))
    near = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return f"nearest: {', '.join(near)}" if near else f"known: {', '.join(known)}"


def some(names: Sequence[str], count: int = 4) -> str:
    """Names the first of many: `"a, b, c, d and 6 more"`.

    Args:
      names: all of them.
      count: how many to name at most.
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more
