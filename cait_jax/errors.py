"""What the package says when its caller made a mistake: one sentence, with the fix in it."""

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """A mistake of the caller's. The message is one sentence that says how to mend it."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Names the members of `names` most like `name`, as the end of a sentence.

    Args:
      name: what was asked for.
      names: what exists.
      count: how many to name at most.

    Returns:
      `"nearest: a, b"`, or, where nothing is alike, `"known: ..."` with every name.
    """
    known = sorted(names)
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
