"""What a run tells is whole, exact, and fits the place where it is read."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import resource
import struct
import sys
import termios
import time

import numpy as np
import pytest

from cait_jax.errors import StorageError, UserError
from cait_jax.train import metrics, trackers
from cait_jax.train.config import get_config
from cait_jax.train.metrics import (
    MAX_LINE,
    TIMING_KEYS,
    MetricWriter,
    metric_lines,
    read_metrics,
    rewind,
)

TRAIN = {
    "train/loss": 0.43123,
    "train/accuracy": 0.912,
    "train/learning_rate": 4.9e-4,
    "train/grad_norm": 1.234,
}


class Clock:
    """Stands in for the module `time`."""

    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now

    def time(self):
        return 1e9 + self.now


@pytest.fixture
def clock(monkeypatch):
    fake = Clock()
    monkeypatch.setattr(metrics, "time", fake)
    return fake


@pytest.fixture
def make_report():
    made = []

    def make(workdir, **options):
        options = {"total_steps": 2000, "images_per_step": 100, "stream": io.StringIO()} | options
        made.append(MetricWriter(workdir, **options))
        return made[-1]

    yield make
    for report in made:
        report.close()


def test_values_come_back_bit_for_bit(tmp_path, make_report):
    floats = np.random.default_rng(0).integers(0, 2**31, 200, np.uint32).view(np.float32)
    floats = floats[np.isfinite(floats)]
    with make_report(tmp_path) as report:
        for step, value in enumerate(floats, 1):
            report.write(step, {"train/loss": value, "eval/count": 3})
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(floats) + 1))
    found = np.array([row["train/loss"] for row in rows], np.float32)
    assert found.tobytes() == floats.tobytes()
    assert all(type(row["step"]) is int and abs(row["time"] - time.time()) < 60 for row in rows)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), np.float32("-inf")])
def test_what_json_cannot_say_is_null(tmp_path, value, make_report):
    with make_report(tmp_path) as report:
        report.write(1, {"train/loss": value})
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=pytest.fail)["train/loss"] is None


def test_a_line_is_one_write_and_there_at_once(tmp_path, make_report):
    report = make_report(tmp_path / "made" / "here")
    report.write(1, TRAIN)
    content = (tmp_path / "made" / "here" / "metrics.jsonl").read_bytes()
    assert content.endswith(b"\n")
    report.close()
    report.close()


def test_two_runs_differ_in_the_timing_keys_only(tmp_path, clock, make_report):
    rows = []
    for name, pause in (("a", 1.0), ("b", 3.0)):
        with make_report(tmp_path / name) as report:
            for step in (1, 2):
                clock.now += pause
                report.progress(step, TRAIN)
            report.write(2, TRAIN)
        rows += read_metrics(tmp_path / name / "metrics.jsonl")
    assert rows[0] != rows[1]
    for row in rows:
        for key in TIMING_KEYS:
            row.pop(key)
    assert rows[0] == rows[1] == {"step": 2, **TRAIN}


def test_a_missing_file_has_no_metrics(tmp_path):
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert not list(tmp_path.iterdir())


def test_reading_leaves_out_a_torn_last_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": null}\n{"step": 2, "a"')
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1, "a": None}]


def test_the_line_of_a_log(tmp_path, clock, make_report):
    stream = io.StringIO()
    report = make_report(tmp_path, stream=stream, images_per_step=812)
    clock.now += 60  # compilation
    report.progress(1, TRAIN)
    report.log(1, TRAIN)
    for step in range(2, 151):
        clock.now += 0.1
        report.progress(step, TRAIN)
    report.write(150, TRAIN)
    report.log(150, TRAIN)
    report.log(150, {"eval/loss": 0.5, "eval/accuracy": 0.25})
    report.message("Saved.")
    assert stream.getvalue().splitlines() == [
        "step    1/2000  loss 0.4312  accuracy 0.912  lr 4.9e-04  grad_norm 1.23",
        "step  150/2000  loss 0.4312  accuracy 0.912  lr 4.9e-04  grad_norm 1.23"
        "   8,120 images/s  ETA 0:03:05",
        "step  150/2000  eval/loss 0.5000  eval/accuracy 0.250",
        "Saved.",
    ]
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert rows[0]["train/images_per_second"] == pytest.approx(8120)


def test_throughput_is_that_since_the_last_log_without_pauses(tmp_path, clock, make_report):
    report = make_report(tmp_path)
    step = 0

    def run(steps, seconds):
        nonlocal step
        for _ in range(steps):
            clock.now += seconds
            step += 1
            report.progress(step, TRAIN)

    def rate():
        report.write(step, TRAIN)
        report.log(step, TRAIN)
        return read_metrics(tmp_path / "metrics.jsonl")[-1].get("train/images_per_second")

    run(1, 60)
    assert rate() is None
    run(4, 0.5)
    assert rate() == pytest.approx(200)
    run(4, 0.25)
    clock.now += 30  # evaluation
    report.write(step, {"eval/loss": 1.0})
    run(4, 0.25)
    assert rate() == pytest.approx(400)
    assert rate() == pytest.approx(400)


def test_a_resumed_run_does_not_count_its_first_step_either(tmp_path, clock, make_report):
    stream = io.StringIO()
    report = make_report(tmp_path, stream=stream, start_step=1000)
    for step, seconds in ((1001, 90), (1002, 2), (1003, 2)):
        clock.now += seconds
        report.progress(step, TRAIN)
    report.log(1003, TRAIN)
    assert stream.getvalue().endswith("    50 images/s  ETA 0:33:14\n")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0:00:00"), (41.0, "0:00:41"), (3599.6, "1:00:00"), (9e4, "25:00:00")],
)
def test_durations(seconds, text):
    assert metrics._duration(seconds) == text


def test_a_value_that_is_not_finite_is_shown_as_such(tmp_path, make_report):
    stream = io.StringIO()
    make_report(tmp_path, stream=stream).log(1, {"train/loss": float("nan")})
    assert "loss nan" in stream.getvalue()


def test_only_the_primary_process_reports(tmp_path, capfd):
    report = MetricWriter(tmp_path / "run", total_steps=9, images_per_step=1, primary=False)
    report.progress(1, TRAIN)
    report.write(1, TRAIN)
    report.log(1, TRAIN)
    report.message("nothing")
    report.sync()
    report.close()
    assert not (tmp_path / "run").exists()
    assert "".join(capfd.readouterr()) == ""


def test_lines_go_to_standard_error(tmp_path, capsys):
    with MetricWriter(tmp_path, total_steps=9, images_per_step=1) as report:
        report.message("Resumed from step 3.")
    assert capsys.readouterr().err == "Resumed from step 3.\n"


def test_sync_brings_the_file_to_the_disk(tmp_path, monkeypatch, make_report):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_ino))
    with make_report(tmp_path) as report:
        report.write(1, TRAIN)
        assert not synced
        report.sync()
    assert synced == [(tmp_path / "metrics.jsonl").stat().st_ino]


def test_a_directory_that_cannot_be_written_is_said(tmp_path, make_report):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/run/metrics.jsonl cannot be written to \(Not a dir"):
        make_report(tmp_path / "file" / "run")


def test_what_a_full_disk_refuses_is_kept_and_written_when_there_is_room(tmp_path, make_report):
    report = make_report(tmp_path)
    report.write(1, TRAIN)
    path, place = tmp_path / "metrics.jsonl", os.dup(report._file.fileno())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:  # of the second line only a part has room
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
        report.write(2, TRAIN)
        report.write(3, TRAIN)
        with pytest.raises(
            StorageError, match=r"cannot be written to \(File too large\): make room"
        ):
            report.sync()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, report._file.fileno())
    with pytest.raises(StorageError, match="No space left"):
        report.sync()
    os.dup2(place, report._file.fileno())
    os.close(full)
    os.close(place)
    report.write(4, TRAIN)
    report.sync()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert report.written()["lines"] == 4
    report.close()


@pytest.fixture
def terminal():
    """A stream that is a terminal of 120 columns, and what was shown on it so far."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
    os.set_blocking(master, False)

    def shown():
        text = b""
        try:
            while chunk := os.read(master, 65536):
                text += chunk
        except BlockingIOError:
            return text.decode()

    with os.fdopen(slave, "w", encoding="utf-8") as stream:
        yield stream, shown
    os.close(master)


def test_a_terminal_gets_a_bar_with_messages_above_it(tmp_path, terminal, make_report):
    stream, shown = terminal
    with make_report(tmp_path, stream=stream, start_step=500) as report:
        for step in range(501, 520):
            report.progress(step, TRAIN)
        report.message("Saved step 519.")
        report.log(519, {"eval/accuracy": 0.5})
        report.log(519, TRAIN)
        text = shown()
    frames = re.split(r"[\r\n]+", text)
    assert "Saved step 519." in frames
    assert "step  519/2000  eval/accuracy 0.500" in frames
    last = frames[-1].strip()
    assert re.search(
        r"26%\|.*\| 519/2000, loss 0.4312  accuracy 0.912  lr 4.9e-04  grad_norm 1.23 +"
        r"[\d,]+ images/s  ETA \d+:\d\d:\d\d$",
        last,
    )
    assert all(len(frame) <= 120 for frame in frames)


def test_the_bar_is_not_drawn_for_every_step(tmp_path, terminal, clock, make_report):
    stream, shown = terminal
    with make_report(tmp_path, stream=stream) as report:
        shown()
        for step in range(1, 1001):
            clock.now += 0.001
            report.progress(step, TRAIN)
        assert 5 <= shown().count("loss") <= 15


def test_tensorboard_gets_the_values_and_hides_a_killed_run(tmp_path, make_report):
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  the format read below

    config = get_config()
    config.report.tensorboard = True
    boards = trackers.from_config(config, tmp_path, 10)
    with make_report(tmp_path, trackers=boards, start_step=10) as report:
        report.write(11, {"train/loss": 0.5})
        report.sync()
    (file,) = (tmp_path / "tensorboard").iterdir()
    content, events = file.read_bytes(), []
    while content:  # length, its checksum, the event, its checksum
        (length,) = struct.unpack("<Q", content[:8])
        events.append(Event.FromString(content[12 : 12 + length]))
        content = content[16 + length :]
    starts = [e.step for e in events if e.session_log.status == SessionLog.START]
    assert starts == [11]
    scalars = [(e.step, v.tag, v.simple_value) for e in events for v in e.summary.value]
    assert scalars == [(11, "train/loss", 0.5)]


def test_tensorboard_without_its_extra_is_said(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    config = get_config()
    config.report.tensorboard = True
    with pytest.raises(UserError, match=r'pip install "cait-jax\[tensorboard\]"'):
        trackers.from_config(config, tmp_path, 0)


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "ti', b'{"step"', b"\0\0\0", b'{"step": 9}'])
def test_rewind_cuts_what_is_later_or_torn(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "train/loss": 0.1}\n' % step for step in (1, 2, 3, 4)]
    path.write_bytes(b"".join(lines) + tail)
    rewind(path, 3)
    assert path.read_bytes() == b"".join(lines[:3])
    with MetricWriter(tmp_path, total_steps=9, start_step=3, images_per_step=1) as report:
        report.write(4, {"eval/loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_keeps_a_last_line_that_lacks_its_end_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    rewind(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_rewind_that_is_stopped_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def stop(descriptor):
        raise OSError(errno.EIO, "stopped")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="stopped"):
        rewind(path, 1)
    assert len(read_metrics(path)) == 2


def test_lines_of_any_length_are_passed_over_one_at_a_time(tmp_path):
    file = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "train/loss": 0.5}).encode()
    long = json.dumps({"step": 2, "text": "x" * (2 * MAX_LINE)}).encode()
    file.write_bytes(row + b"\n" + long + b"\n" + b"\0" * MAX_LINE + b"\n" + row)
    assert [line for line, _ in metric_lines(file)] == [row, row]
    assert rewind(file, 1) == ""
    assert file.read_bytes() == row + b"\n" + row + b"\n"


def test_metrics_are_read_from_a_regular_file_alone(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="named pipe"):
        read_metrics(tmp_path / "metrics.jsonl")
