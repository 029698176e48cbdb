import io

import jax
import pytest

from cait_jax.evaluation import scores
from cait_jax.evaluation.scores import show_progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    times = [0.0]
    monkeypatch.setattr(scores.time, "monotonic", lambda: times[0])
    return times


def test_now_and_then_a_line_in_a_log(clock):
    stream = io.StringIO()
    with show_progress(10_000, "imagenet_v2", stream) as update:
        for second in range(0, 100, 10):
            clock[0] = float(second)
            update(200)
    assert stream.getvalue().splitlines() == [
        "imagenet_v2: 800 of 10,000 images, 27 images/s",
        "imagenet_v2: 1,400 of 10,000 images, 23 images/s",
        "imagenet_v2: 2,000 of 10,000 images, 22 images/s",
    ]


def test_a_bar_on_a_terminal():
    stream = Terminal()
    with show_progress(100, "digits", stream) as update:
        update(60)
        update(60)  # no further than the end
    assert "digits" in stream.getvalue()
    assert "image/s" in stream.getvalue()


def test_each_process_counts_for_all_and_the_first_alone_speaks(clock, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    stream = io.StringIO()
    with show_progress(90, "digits", stream) as update:
        clock[0] = 40.0
        update(10)
    assert "40 of 90" in stream.getvalue()
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    silent = Terminal()
    with show_progress(90, "digits", silent) as update:
        update(10)
    assert silent.getvalue() == ""
