import os
import pickle

import pytest

from cait_jax.data.decode import BrokenImage
from cait_jax.errors import UserError, composed, nearest, printable, writable


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("a\nb\r\x1b[2J\x7f\x9b", r"a\x0ab\x0d\x1b[2J\x7f\x9b"),
        ("\u202egpj.exe\u2066\u2028", r"\u202egpj.exe\u2066\u2028"),
        (os.fsdecode(b"caf\xe9"), r"caf\xe9"),
        ("\ud83d", r"\ud83d"),
        ("caf\u00e9 \N{CAT FACE}\u200d\u4e2d.png", "caf\u00e9 \N{CAT FACE}\u200d\u4e2d.png"),
    ],
)
def test_what_a_terminal_would_obey_or_cannot_show_is_escaped(name, shown):
    assert printable(name) == printable(shown) == shown
    assert str(UserError(f"no {name}")) == f"no {shown}"
    assert shown in nearest(name + "x", [name])


def test_line_feeds_may_stay():
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_only_surrogates_are_not_writable():
    assert writable("\x1b\n\u202e\udce9") == "\x1b\n\u202e\\xe9"


def test_errors_are_pickled():
    again = pickle.loads(pickle.dumps(BrokenImage("a\nb")))
    assert (type(again), str(again)) == (BrokenImage, r"a\x0ab")


def test_names_are_compared_composed():
    assert composed("cafe\u0301") == composed("caf\u00e9")
