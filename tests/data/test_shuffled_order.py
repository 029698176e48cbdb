"""The order of splits that are too large for a list: every example once, in constant memory, from any step."""

import itertools
import time
import tracemalloc

import numpy as np
import pytest
from marks import slow
from scipy import stats
from tfds_files import numbered_jpeg

from cait_jax.data import sampler
from cait_jax.data.loader import train_batches
from cait_jax.data.sampler import BatchSlice, Sampler, class_balanced_order, permutation
from cait_jax.data.split import Encoded, InMemory

SIZE = (4, 6)
JPEG = numbered_jpeg(3, 8, 12)


class Records:
    """As many examples as asked for, all of one image; example i has label i."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"image": JPEG, "label": index}


def fake(count):
    return Encoded(Records(count), ("one",), 3)


def in_memory(count):
    images = np.zeros((count, *SIZE, 3), np.uint8)
    return InMemory(images, np.arange(count, dtype=np.int32), ("one",))


def labels(split, steps, **options):
    defaults = {"seed": 5, "batch_size": 4, "image_size": SIZE}
    with train_batches(split, **defaults | options) as batches:
        return np.concatenate([batch["label"] for batch in itertools.islice(batches, steps)])


@pytest.fixture
def short_lists(monkeypatch):
    """Lists of up to 16 examples."""
    monkeypatch.setattr(sampler, "LISTED", 16)


@pytest.mark.parametrize("seed", [0, -3, 2**32 + 1])
@pytest.mark.parametrize("count", [15, 16, 17, 18, 64, 65, 1000])
@pytest.mark.usefixtures("short_lists")
def test_every_epoch_shows_each_example_once_in_a_new_order(count, seed):
    epochs = Sampler(seed, count).indices(np.arange(3 * count)).reshape(3, count)
    np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(count), (3, 1)))
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    listed = [permutation(seed, epoch, count) for epoch in range(3)]
    assert np.array_equal(epochs, listed) == (count <= 16)


@pytest.mark.usefixtures("short_lists")
def test_repeats_show_a_part_of_the_epoch_several_times():
    whole = Sampler(5, 100).indices(np.arange(200)).reshape(2, 100)
    repeated = Sampler(5, 100, repeats=3).indices(np.arange(200)).reshape(2, 100)
    np.testing.assert_array_equal(repeated, np.repeat(whole, 3, axis=1)[:, :100])


@pytest.mark.usefixtures("short_lists")
def test_what_replaces_a_broken_image_is_next_in_the_order():
    order = Sampler(5, 20).indices(np.arange(20, 40)).tolist()
    assert list(Sampler(5, 20).candidates(20 + 17)) == order[17:] + order[:17]
    assert list(Sampler(5, 20, repeats=3).candidates(20 + 17)) == order[5:] + order[:5]


@pytest.mark.usefixtures("short_lists")
def test_balanced_classes_keep_their_list():
    of_class = np.repeat(np.arange(3), [3, 20, 40])
    expected = [class_balanced_order(of_class, 5, epoch) for epoch in range(2)]
    found = Sampler(5, 63, labels=of_class).indices(np.arange(126))
    np.testing.assert_array_equal(found, np.concatenate(expected))


@pytest.mark.parametrize("make", [fake, in_memory])
@pytest.mark.usefixtures("short_lists")
def test_batches_straddle_epochs_and_are_resumed_and_divided(make):
    split = make(33)
    whole = labels(split, 25)
    np.testing.assert_array_equal(np.sort(whole[:99].reshape(3, 33)), [list(range(33))] * 3)
    np.testing.assert_array_equal(labels(split, 5, start_step=7), whole[28:48])
    parts = [labels(split, 25, process_index=index, process_count=2) for index in range(2)]
    joined = np.concatenate([part.reshape(25, 2) for part in parts], axis=1)
    np.testing.assert_array_equal(joined.ravel(), whole)


@pytest.mark.usefixtures("short_lists")
def test_groups_that_are_mixed_hold_the_batch_in_their_order():
    options = {"batch_size": 12, "repeats": 3, "mix_rows": 4}
    found = labels(in_memory(40), 8, **options)
    positions = BatchSlice(12, 0, 1, group_rows=4).position(np.arange(96))
    np.testing.assert_array_equal(found, Sampler(5, 40, repeats=3).indices(positions))
    assert all(len(set(group)) == 4 for group in found.reshape(-1, 4).tolist())


def test_the_order_is_that_of_every_version():
    found = Sampler(3, 10**9).indices(np.array([0, 1, 2, 10**9 - 1, 10**9, 7 * 10**9 + 5]))
    assert found.tolist() == [
        3251817, 544449319, 670817361, 752963805, 150293389, 770082645,
    ]  # fmt: skip
    assert len(set(Sampler(3, 5 * 10**9).indices(np.arange(1000)).tolist())) == 1000


@pytest.mark.parametrize("count", [sampler.LISTED + 1, 14_197_122, 10**9])
def test_examples_that_follow_each_other_are_from_anywhere(count):
    """Of 20 epochs each, 4,096 examples by where they are in the split, and by the way from one to the next."""
    starts = np.random.default_rng(count).integers(0, count - 4096, 20)
    runs = [
        Sampler(7, count).indices(epoch * count + start + np.arange(4096))
        for epoch, start in enumerate(starts)
    ]
    for found in (np.stack(runs), np.diff(runs) % count):
        where = np.stack([np.bincount(row * 100 // count, minlength=100) for row in found])
        expected = where.sum(axis=1, keepdims=True) / 100
        assert stats.chi2.sf(((where - expected) ** 2 / expected).sum(), 20 * 99) > 1e-3


@pytest.mark.parametrize("step", [0, 3 * 10**8 + 1])
def test_a_thousand_million_examples_start_at_once_from_any_step(step):
    labels(fake(100), 1)  # imports
    began = time.process_time()
    found = labels(fake(10**9), 2, start_step=step, batch_size=64)
    assert time.process_time() - began < 1
    expected = Sampler(5, 10**9).indices(64 * step + np.arange(128))
    np.testing.assert_array_equal(found, expected)
    tracemalloc.start()
    try:
        labels(fake(10**9), 1, start_step=step, batch_size=64)
        assert tracemalloc.get_traced_memory()[1] < 50e6
    finally:
        tracemalloc.stop()


@slow
def test_workers_have_the_order_too():
    split = fake(sampler.LISTED + 3)
    step = sampler.LISTED // 4 - 2  # straddles the first two epochs
    whole = labels(split, 5, start_step=step)
    np.testing.assert_array_equal(labels(split, 5, start_step=step, workers=2), whole)
    expected = Sampler(5, len(split)).indices(4 * step + np.arange(20))
    np.testing.assert_array_equal(whole, expected)
