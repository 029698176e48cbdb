"""Messages: names escaped, settings as each interface writes them, and the sentence as a program's last line."""

import errno
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from cait_jax.cli.common import command_options
from cait_jax.data.split import BrokenImage
from cait_jax.errors import (
    KEY_OF,
    Literal,
    UserError,
    Way,
    advise,
    can_set,
    composed,
    config_flags,
    explain,
    in_python,
    nearest,
    printable,
    setting,
    speaking,
    writable,
)
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


ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
NOISE = """
import asyncio, logging, multiprocessing, os, sys, threading, time, warnings
from cait_jax.errors import run_program

class Mistake(Exception):
    pass

class Finaliser:
    def __del__(self):
        raise RuntimeError("nobody catches this")

def chatter():
    while True:
        os.write(2, b"a library's own line\\n")
        time.sleep(0.001)

def child(queue):
    queue.put(1)
    time.sleep(0.5)
    os.write(2, b"a child's last words\\n")

def main():
    logging.getLogger("absl").error("Traceback", exc_info=ValueError("x"))
    logging.getLogger("asyncio").error("Task exception was never retrieved")
    Finaliser()
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    context.Process(target=child, args=(queue,)).start()
    queue.get()
    threading.Thread(target=chatter, daemon=True).start()
    threading.Thread(target=time.sleep, args=(1e6,)).start()  # which Python would wait for
    time.sleep(0.05)
    print("what was found")
    {ending}

if __name__ == "__main__":
    sys.exit(run_program("prog", main, (Mistake,)))
"""


@pytest.mark.parametrize(
    ("ending", "status", "last"),
    [
        ('raise Mistake("give another")', 1, "prog: give another"),
        ('raise OSError(28, "No space left on device", "/x/y")', 1,
         "prog: /x/y: no space left on device; make room, or choose another place"),
        ('sys.exit("prog: as it is")', 1, "prog: as it is"),
    ],
)  # fmt: skip
def test_the_sentence_is_the_last_line(tmp_path, ending, status, last):
    program = tmp_path / "program.py"
    program.write_text(NOISE.replace("{ending}", ending).replace("\\\\n", "\\n"))
    result = subprocess.run(
        [sys.executable, program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=ENVIRONMENT,
    )
    lines = result.stderr.splitlines()
    assert (result.returncode, lines[-1]) == (status, last)
    assert result.stdout == "what was found\n"
    assert set(lines[:-1]) == {"a library's own line"}


def test_a_defect_keeps_its_traceback(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "from cait_jax.errors import run_program\nrun_program('prog', lambda: [][1], (KeyError,))\n"
    )
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        1, "IndexError: list index out of range"
    )  # fmt: skip


def test_refusals_of_the_machine_are_sentences():
    refused = PermissionError(errno.EACCES, "Permission denied", "/runs")
    assert explain(refused) == (
        "/runs: permission denied; change its permissions, or choose another place"
    )
    absent = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")
    assert explain(absent) == (
        "/proc/x: no such file or directory; check the path, or choose another place"
    )
    exhausted = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")
    assert "too little memory (RESOURCE_EXHAUSTED" in explain(exhausted)
    assert explain(exhausted).endswith(
        "lower batch_size, or lower image_size, or use a smaller model"
    )
    assert explain(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    assert explain(ValueError("a defect")) is None
