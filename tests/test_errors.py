"""Messages: names escaped, and settings as each interface writes them."""

import os
import pickle
import subprocess
import sys

import pytest

from cait_jax.cli.common import command_options
from cait_jax.data.split import BrokenImage
from cait_jax.errors import (
    Literal,
    UserError,
    Way,
    advise,
    can_set,
    composed,
    config_flags,
    in_python,
    nearest,
    printable,
    setting,
    speaking,
    writable,
)
from cait_jax.renamed import KEY_OF
from cait_jax.train.config import get_config


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


COMMAND = command_options(
    {"epochs": "--epochs", "ema": "--ema", "name_or_path": "--model"}, frozenset({"ema"})
)


@pytest.mark.parametrize(
    ("name", "value", "python", "train", "command"),
    [
        ("reset_head", True, "reset_head=True", "--config.init.reset_head=True", "reset head"),
        ("num_classes", 3, "num_classes=3", "num classes", "num classes"),
        ("config.epochs", 2.0, "--config.epochs=2.0", "--config.epochs=2.0", "--epochs 2.0"),
        ("ema", True, "ema=True", "--config.init.ema=True", "--ema"),
        ("config.mesh.data", -1, "--config.mesh.data=-1", "--config.mesh.data=-1", "data"),
        (
            "name_or_path", Literal("NAME"), "name_or_path=NAME", "--config.model.name=NAME",
            "--model NAME",
        ),
    ],
)  # fmt: skip
def test_a_setting_in_each_interface(name, value, python, train, command):
    assert (setting(name, value), in_python()) == (python, True)
    with speaking(config_flags):
        assert (setting(name, value), in_python()) == (train, False)
        with speaking(COMMAND):
            assert setting(name, value) == command
        assert setting(name, value) == train


def test_only_ways_that_are_open_are_advised():
    ways = Way("give {} to start anew", "reset_head", True), Way("{} to keep it", "num_classes", 3)
    assert advise(*ways) == "give reset_head=True to start anew, or num_classes=3 to keep it"
    with speaking(config_flags):
        assert advise(*ways) == "give --config.init.reset_head=True to start anew"
    with speaking(COMMAND):
        assert (advise(*ways), advise(*ways, otherwise="choose others")) == ("", "choose others")
        assert advise(*ways, "choose others") == "choose others"
        assert can_set("epochs")
        assert not can_set("reset_head")


def test_the_interface_ends_with_an_error():
    with pytest.raises(KeyError), speaking(config_flags):
        raise KeyError
    assert in_python()


def test_the_keys_exist():
    known = set(get_config().model) | {"projection_dropout"}
    for name, key in KEY_OF.items():
        section = key.removeprefix("config.")
        if section.startswith("model."):
            assert section.removeprefix("model.") in known, name
        else:
            assert get_config()[section.partition(".")[0]] is not None


LOST = """
import gc, os, signal, time
from cait_jax.errors import quiet_libraries

def callback(phase, info):
    gc.callbacks.remove(callback)
    os.kill(os.getpid(), signal.SIGINT)
    str(phase)  # the exception is raised here, where nobody can catch it

quiet_libraries()
signal.signal(signal.SIGINT, signal.default_int_handler)
gc.callbacks.append(callback)
gc.collect()
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("heard")
"""


def test_a_ctrl_c_during_garbage_collection_is_not_lost():
    result = subprocess.run(
        [sys.executable, "-c", LOST], capture_output=True, text=True, timeout=50, check=False
    )
    assert (result.stdout, result.stderr) == ("heard\n", "")
