"""A program ends on its sentence, whatever libraries write from threads, children and finalisers."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cait_jax.exits import sentence

ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
NOISE = """
import asyncio, logging, multiprocessing, os, sys, threading, time, warnings
from cait_jax import exits

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
    sys.exit(exits.run("prog", main, (Mistake,)))
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
        "from cait_jax import exits\nexits.run('prog', lambda: [][1], (KeyError,))\n"
    )
    result = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, check=False, env=ENVIRONMENT
    )
    assert (result.returncode, result.stderr.splitlines()[-1]) == (
        1, "IndexError: list index out of range"
    )  # fmt: skip


def test_refusals_of_the_machine_are_sentences():
    refused = PermissionError(errno.EACCES, "Permission denied", "/runs")
    assert sentence(refused) == (
        "/runs: permission denied; change its permissions, or choose another place"
    )
    absent = FileNotFoundError(errno.ENOENT, "No such file or directory", "/proc/x")
    assert sentence(absent) == (
        "/proc/x: no such file or directory; check the path, or choose another place"
    )
    exhausted = RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 3 bytes.")
    assert "too little memory (RESOURCE_EXHAUSTED" in sentence(exhausted)
    assert sentence(exhausted).endswith(
        "lower batch_size, or lower image_size, or use a smaller model"
    )
    assert sentence(BrokenPipeError(errno.EPIPE, "Broken pipe")) is None
    assert sentence(ValueError("a defect")) is None
