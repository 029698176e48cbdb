"""One process at a time in a directory, and a lock that a dead one left behind is taken over."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from cait_jax import UserError, files
from cait_jax.files import DirectoryLock

HOLD = """
import sys, time
from pathlib import Path
from cait_jax.files import DirectoryLock
with DirectoryLock(Path(sys.argv[1])) as lock:
    print(lock.taken_over or "held", flush=True)
    time.sleep(60)
"""


def holder(directory):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline()
    return process


def end(process):
    process.kill()
    process.wait()
    process.stdout.close()


def of_another_host(directory, seconds_ago):
    """A lock that another host wrote, last touched some time ago."""
    lock = directory / files.LOCK
    lock.write_text(json.dumps({"host": "elsewhere", "boot": "x", "process": 7, "since": "noon"}))
    then = time.time() - seconds_ago
    os.utime(lock, (then, then))


def test_a_directory_is_held_and_released(tmp_path):
    for _ in range(2):
        with DirectoryLock(tmp_path) as lock:
            assert lock.taken_over == ""
            assert json.loads((tmp_path / "lock.json").read_text())["process"] == os.getpid()
            with pytest.raises(UserError, match=f"in use by process {os.getpid()} on "):
                DirectoryLock(tmp_path)
            lock.check()
        assert list(tmp_path.iterdir()) == []


def test_a_living_process_is_named_and_a_killed_one_replaced(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"is in use by process {process.pid} on .*--workdir"):
        DirectoryLock(tmp_path)
    end(process)
    with DirectoryLock(tmp_path) as lock:
        assert f"from process {process.pid} on" in lock.taken_over


def test_a_stopped_process_still_holds_it(tmp_path):
    process = holder(tmp_path)
    process.send_signal(signal.SIGSTOP)
    with pytest.raises(UserError, match="in use by"):
        DirectoryLock(tmp_path)
    end(process)


def test_another_host_holds_it_while_its_heart_beats(tmp_path):
    of_another_host(tmp_path, seconds_ago=20)
    with pytest.raises(UserError, match=r"process 7 on elsewhere .since noon.*60 seconds later"):
        DirectoryLock(tmp_path)
    of_another_host(tmp_path, seconds_ago=61)
    with DirectoryLock(tmp_path) as lock:
        assert "from process 7 on elsewhere" in lock.taken_over
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, '{"host": 3}', "\0" * 40])
def test_what_a_crash_leaves_of_a_lock_file_is_taken_over(tmp_path, content):
    (tmp_path / "lock.json").write_text(content)
    then = time.time() - 100
    os.utime(tmp_path / "lock.json", (then, then))
    with DirectoryLock(tmp_path) as lock:
        lock.check()


def test_storage_without_flock_has_the_heartbeat_alone(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(files.fcntl, "flock", no_locks)
    with DirectoryLock(tmp_path), pytest.raises(UserError, match="in use"):
        DirectoryLock(tmp_path)
    of_another_host(tmp_path, seconds_ago=1)
    with pytest.raises(UserError, match="elsewhere"):
        DirectoryLock(tmp_path)


def test_a_process_whose_lock_was_taken_while_it_was_cut_off_notices(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "HEARTBEAT_S", 0.05)
    with DirectoryLock(tmp_path) as lock:
        of_another_host(tmp_path, seconds_ago=0)
        lock._thread.join(timeout=30)
        with pytest.raises(UserError, match="was taken over by process 7 on elsewhere"):
            lock.check()
    assert (tmp_path / "lock.json").exists()  # the other's


def test_of_many_that_start_at_once_one_holds_it(tmp_path):
    started = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, str(tmp_path)],
            stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    deadline = time.monotonic() + 60
    while sum(process.poll() is None for process in started) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    alive = [process for process in started if process.poll() is None]
    assert len(alive) == 1
    assert json.loads((tmp_path / "lock.json").read_text())["process"] == alive[0].pid
    for process in started:
        end(process)


def test_a_holder_that_has_not_yet_written_its_name_is_waited_for(tmp_path):
    """Two that start at the same moment: the one that is refused names the other."""
    file = os.open(tmp_path / "lock.json", os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_EX)
    record = json.dumps({"host": "here", "process": 7}).encode()
    later = threading.Timer(0.2, os.pwrite, (file, record, 0))
    later.start()
    try:
        with pytest.raises(UserError, match="in use by process 7 on here"):
            DirectoryLock(tmp_path)
    finally:
        later.join()
        os.close(file)
