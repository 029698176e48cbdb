"""Batches that load before they are asked for: order, errors, and an end that nobody waits for."""

import threading

import numpy as np
import pytest

from cait_jax.data.ahead import Ahead
from cait_jax.data.pipeline import Batches


class Source:
    """Numbered batches; each waits for `may_load`, and closing waits for `may_close`."""

    def __init__(self, count, error=None):
        self.count, self.error = count, error
        self.made = 0
        self.may_load, self.may_close, self.closed = (threading.Event() for _ in range(3))
        self.loading = threading.Event()

    def __next__(self):
        self.loading.set()
        assert self.may_load.wait(10)
        if self.error is not None:
            raise self.error
        if self.made == self.count:
            raise StopIteration
        self.made += 1
        return {"image": np.array(self.made)}

    def close(self):
        assert self.may_close.wait(10)
        self.closed.set()


def test_the_first_batch_loads_unasked_and_the_end_is_not_waited_for():
    source = Source(3)
    with Ahead(Batches(source), count=3) as ahead:
        assert source.loading.wait(10)
        source.may_load.set()
        assert [int(batch["image"]) for batch in ahead] == [1, 2, 3]
        assert not source.closed.is_set()
    assert not source.closed.is_set()  # it could not end yet, and here we are
    source.may_close.set()
    assert source.closed.wait(10)


def test_closing_what_is_still_loading_waits_for_nothing():
    source = Source(3)
    ahead = Ahead(Batches(source), count=3)
    ahead.close()
    ahead.close()
    assert list(ahead) == []
    source.may_load.set()
    source.may_close.set()
    assert source.closed.wait(10)


def test_an_error_of_the_first_batch_comes_when_it_is_asked_for():
    source = Source(3, OSError("gone"))
    source.may_load.set()
    source.may_close.set()
    with Ahead(Batches(source), count=3) as ahead, pytest.raises(OSError, match="gone"):
        next(ahead)
    assert source.closed.wait(10)
