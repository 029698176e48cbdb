"""One of several processes hangs, is silent or leaves: every process ends, and names it."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
from ml_collections import ConfigDict

from cait_jax.errors import StorageError
from cait_jax.peers import Peers
from cait_jax.train import watchdog
from cait_jax.train.watchdog import Report, Watchdog

ROOT = Path(__file__).parents[2]
LIMITS = ConfigDict({"seconds": 0.4, "factor": 20.0, "start_seconds": 5.0})


@pytest.fixture(autouse=True)
def _often(monkeypatch):
    monkeypatch.setattr(watchdog, "_INTERVAL_S", 0.02)


class Board:
    """The reports of all processes, as their connections carry them."""

    def __init__(self):
        self.reports = {}
        self.ended = {}
        self.left = set()
        self.silent = False

    def watch(self, index, count=2):
        return Watchdog(LIMITS, Peer(self, index), index=index, count=count)

    def wait(self, count, seconds=3.0):
        deadline = time.monotonic() + seconds
        while len(self.ended) < count and time.monotonic() < deadline:
            time.sleep(0.01)
        return dict(self.ended)


class Peer(Peers):
    def __init__(self, board, index):
        self.board, self.index = board, index

    def exchange(self, place, report):
        if not self.board.silent:
            self.board.reports[self.index] = report
        return dict(self.board.reports)

    def end_all(self, sentence):
        self.board.ended.setdefault(self.index, sentence)

    def end_others(self, sentence):
        self.board.ended["others"] = sentence

    def leave(self):
        self.board.left.add(self.index)

    def name(self, index):
        return f"process {index} on there"


def take(watches, steps, *, seconds=0.01):
    for step in range(1, steps + 1):
        for phase in ("data", "step"):
            for watch in watches:
                watch.enter(phase, step)
            time.sleep(seconds)


def test_the_process_that_the_others_wait_for_is_named_by_all():
    board = Board()
    with board.watch(0) as first, board.watch(1) as second:
        take([first, second], 3)
        assert not board.ended
        second.enter("data", 4)  # and hangs in it
        for phase, step in (("data", 4), ("step", 4), ("data", 5), ("step", 5)):
            first.enter(phase, step)
        ended = board.wait(2)
    assert set(ended) == {0, 1}
    for sentence in ended.values():
        assert sentence.startswith("process 1 on there spent ")
        assert " s in the data of step 4, where " in sentence


def test_a_slow_step_within_its_limit_ends_nobody():
    """The limit follows the slowest step of late: here 20 times 0.1 s."""
    board = Board()
    with board.watch(0) as first, board.watch(1) as second:
        take([first, second], 3, seconds=0.1)
        for watch in (first, second):
            watch.enter("data", 4)
        first.enter("step", 4)
        time.sleep(1.0)
    assert not board.ended
    assert first.report().limit == pytest.approx(2.0, rel=0.2)


def test_the_first_of_a_phase_may_last_as_long_as_a_start():
    board = Board()
    with board.watch(0) as first, board.watch(1) as second:
        for watch in (first, second):
            watch.enter("save", 1)
        time.sleep(3 * LIMITS.seconds)
    assert not board.ended
    assert first.report().limit == LIMITS.start_seconds


def test_a_silent_process_is_named():
    board = Board()
    board.reports[1] = Report(1, 5, "step", 7, 0.0, 9.0).__dict__
    with board.watch(0) as first:
        take([first], 2)
        ended = board.wait(1)
    assert ended[0].startswith("process 1 on there has not answered for ")
    assert "last in step 7" in ended[0]


def test_a_silent_process_0_is_named_though_no_report_comes_any_more():
    """It passes on the reports of the others."""
    board = Board()
    with board.watch(1, count=3) as second, board.watch(2, count=3) as third:
        board.reports[0] = Report(1, 9, "save", 9, 0.0, 9.0).__dict__
        take([second, third], 3)
        board.silent = True
        ended = board.wait(2)
    assert len(ended) == 2
    for sentence in ended.values():
        assert sentence.startswith("process 0 on there has not answered for ")


def test_all_are_named_that_may_hang_in_the_phase_that_the_others_wait_in():
    board = Board()
    with (
        board.watch(0, count=3) as first,
        board.watch(1, count=3) as second,
        board.watch(2, count=3) as third,
    ):
        take([first, second, third], 3)
        third.enter("data", 4)
        ended = board.wait(3)
    assert len(ended) == 3
    assert ended[2].startswith("process 0 on there and process 1 on there spent 0 s in step 3, ")


def test_who_does_not_come_out_of_its_start_is_named(monkeypatch):
    monkeypatch.setitem(LIMITS, "start_seconds", 0.5)
    board = Board()
    with board.watch(0) as first:
        take([first], 2)
        assert not board.ended
        ended = board.wait(1)
    assert ended[0].startswith("process 1 on there spent ")
    assert "in its start" in ended[0]


def test_who_leaves_by_an_error_tells_the_others_and_who_is_done_is_not_missed():
    board = Board()
    with board.watch(0, count=3) as first:
        with board.watch(1, count=3) as second:
            take([first, second], 2)
        assert board.left == {1}
        with contextlib.suppress(SystemExit), board.watch(2, count=3) as third:
            take([third], 2)
            sys.exit(0)
        assert "process 2 on there ended in step 2 by SystemExit: 0" in board.ended["others"]
        time.sleep(2 * LIMITS.seconds)
    assert set(board.ended) == {"others"}
    assert board.left == {0, 1}


@pytest.mark.parametrize("kind", [jax.errors.JaxRuntimeError, ValueError])
def test_an_error_that_follows_from_another_process_is_not_told_as_its_cause(monkeypatch, kind):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    board = Board()
    with contextlib.suppress(StorageError), board.watch(0):
        try:
            raise kind("UNKNOWN: Gloo AllGather failed: Connection reset by peer")
        except Exception as error:
            raise StorageError("Saving step 3 failed") from error
    assert not board.ended


def test_being_stopped_oneself_is_no_silence_of_the_others(monkeypatch):
    board = Board()
    with board.watch(0) as first, board.watch(1) as second:
        take([first, second], 2)
        later = 100.0
        monotonic = time.monotonic
        monkeypatch.setattr(watchdog.time, "monotonic", lambda: monotonic() + later)
        time.sleep(0.2)
    assert not board.ended


CHILD = """
import os, sys, time
import train
from cait_jax.train import loop

fault, put, count = sys.argv.pop(1), loop.put_batch, 0

def broken(*arguments):
    global count
    count += 1
    if count == 8 and fault == "hang":
        time.sleep(1000)
    if count == 8 and fault == "exit":
        sys.exit(0)
    if count == 8 and fault == "die":
        os.kill(os.getpid(), 9)
    return put(*arguments)

loop.put_batch = broken
sys.exit(train.program())
"""


def start(environment, workdir, faults, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    given = {
        "steps": 100_000, "batch_size": 32, "model.width": 16, "model.num_heads": 2, "model.depth": 1,
        "report.every_steps": 1, "eval.every_epochs": 1000, "mesh.data": 2, "watchdog.seconds": 6,
    } | settings  # fmt: skip
    return [
        subprocess.Popen(
            [
                sys.executable, "-c", CHILD, fault, "--config=configs/digits.py", f"--workdir={workdir}",
                *(f"--config.{key}={value}" for key, value in given.items()),
                f"--coordinator={address}", f"--processes={len(faults)}", f"--process={index}",
            ],
            cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )
        for index, fault in enumerate(faults)
        if fault != "never"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)} | compilation_cache


@pytest.mark.slow
def test_a_process_that_hangs_in_its_data_ends_both(tmp_path, environment):
    for process in start(environment, tmp_path, ["", "hang"]):
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 1
        assert "process 1 on " in said.splitlines()[-1]
        assert " s in the data of step 8, where 6 s are allowed" in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_process_that_exits_ends_the_other(tmp_path, environment, culprit):
    faults = ["", ""]
    faults[culprit] = "exit"
    for process in start(environment, tmp_path, faults):
        said = process.communicate(timeout=60)[1]
        assert process.returncode == 1
        assert f"process {culprit} on " in said.splitlines()[-1]
        assert " ended in the data of step 8 by SystemExit: 0" in said.splitlines()[-1]


@pytest.mark.slow
@pytest.mark.parametrize("culprit", [0, 1])
def test_a_killed_process_ends_the_other_in_a_second(tmp_path, environment, culprit):
    """In the data of a step, in which the other is not."""
    faults = ["", ""]
    faults[culprit] = "die"
    processes = start(environment, tmp_path, faults)
    processes[culprit].communicate(timeout=60)
    died = time.monotonic()
    said = processes[1 - culprit].communicate(timeout=60)[1]
    assert time.monotonic() - died < 5.0  # one on an idle machine; the watchdog takes six
    assert processes[1 - culprit].returncode == 1
    assert (
        f"process {culprit} on {socket.gethostname()} has ended, last in " in said.splitlines()[-1]
    )
    assert "coordination_service" not in said


@pytest.mark.slow
def test_a_stopped_process_0_is_named_though_its_service_is_silent(tmp_path, environment):
    first, second = start(environment, tmp_path, ["", ""])
    metrics = tmp_path / "metrics.jsonl"
    while first.poll() is None and not (metrics.exists() and metrics.read_bytes().count(b"\n") > 5):
        time.sleep(0.05)
    first.send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    said = second.communicate(timeout=200)[1]
    waited = time.monotonic() - stopped
    first.kill()
    first.communicate()
    assert second.returncode == 1
    assert "process 0 on " in said.splitlines()[-1]
    assert " has not answered for " in said.splitlines()[-1]
    assert 5 < waited < 20
