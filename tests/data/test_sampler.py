"""Which example stands in which row, which rows are mixed with each other, and classes equally often."""

import numpy as np
import pytest

from cait_jax.data.loader import train_batches
from cait_jax.data.sampler import (
    BatchSlice,
    class_balanced_order,
    copies_in_a_group,
    grouped_positions,
)
from cait_jax.data.split import InMemory
from cait_jax.errors import UserError


def numbered(count):
    """A split whose image i holds the number i."""
    images = np.arange(count)[:, None] // np.array([1, 256]) % 256
    return InMemory(
        images.astype(np.uint8).reshape(count, 1, 2, 1), np.zeros(count, np.int32), ("one",)
    )


def mixed_with_a_copy(examples, rows):
    """BatchSlice whose group holds another copy of their example, and rows mixed with their own example."""
    shared = self_mixed = 0
    for start in range(0, len(examples), rows):
        group = examples[start : start + rows]
        _, inverse, counts = np.unique(group, return_inverse=True, return_counts=True)
        shared += int((counts[inverse] > 1).sum())
        self_mixed += int((group == group[::-1]).sum())
    return shared, self_mixed


@pytest.mark.parametrize("processes", [1, 4])
def test_copies_of_an_image_are_never_mixed_by_one_draw(processes):
    """The ImageNet recipe: batches of 1,024, groups of 64, three copies."""
    split = numbered(4_096)
    options = {"seed": 3, "batch_size": 1024, "image_size": (1, 2), "repeats": 3}
    streams = [
        train_batches(split, mix_rows=64, process_index=index, process_count=processes, **options)
        for index in range(processes)
    ]
    plain = train_batches(split, **options)
    for _ in range(3):
        images = np.concatenate([next(stream)["image"] for stream in streams]).astype(int)
        examples = images.reshape(-1, 2) @ [1, 256]
        in_order = next(plain)["image"].astype(int).reshape(-1, 2) @ [1, 256]
        assert sorted(examples) == sorted(in_order)
        assert mixed_with_a_copy(examples, 64) == (0, 0)
        assert mixed_with_a_copy(in_order, 1024)[0] > 1000


@pytest.mark.parametrize(
    ("batch", "rows", "repeats"),
    [(1024, 64, 3), (1000, 64, 3), (96, 32, 3), (200, 64, 3), (8, 2, 4)],
)
def test_groups_are_even_and_hold_no_copies_wherever_an_image_starts(batch, rows, repeats):
    places = grouped_positions(batch, rows)
    assert sorted(places) == list(range(batch))
    for offset in range(repeats):
        image = (places + offset) // repeats
        assert mixed_with_a_copy(image, rows) == (0, 0)
    assert copies_in_a_group(batch, rows, repeats) == 0


def test_one_group_keeps_the_order():
    for rows in (0, 64, 100):
        np.testing.assert_array_equal(grouped_positions(64, rows), np.arange(64))
    assert BatchSlice(64, 1, 2, 5).position(3) == 5 * 64 + 32 + 3
    assert copies_in_a_group(1024, 0, 3) == 1023
    assert copies_in_a_group(128, 64, 1) == 0


def test_too_few_groups_are_counted():
    """Two groups and three copies: two copies of every image share one, or three."""
    assert copies_in_a_group(126, 63, 3) == 84


def test_rows_of_a_process_are_those_of_the_whole():
    whole = BatchSlice(96, 0, 1, 7, group_rows=32)
    for index in range(3):
        part = BatchSlice(96, index, 3, 7, group_rows=32)
        expected = whole.position(2 * 96 + np.arange(96))[index * 32 : (index + 1) * 32]
        np.testing.assert_array_equal(part.position(2 * 32 + np.arange(32)), expected)
        assert [part.position(64 + row) for row in range(32)] == expected.tolist()


# 100 examples of four classes, in no order; class 3 has none.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [1, 3, 26, 70]))


def drawn(labels, epochs, seed=0):
    return np.stack([class_balanced_order(labels, seed, epoch) for epoch in range(epochs)])


def test_an_epoch_has_as_many_of_each_class():
    for order in drawn(LABELS, 3):
        classes, counts = np.unique(LABELS[order], return_counts=True)
        np.testing.assert_array_equal(classes, [0, 1, 2, 4])
        np.testing.assert_array_equal(counts, 25)


def test_what_does_not_divide_goes_to_the_classes_in_turn():
    labels = np.repeat(np.arange(7), [1, 2, 3, 4, 5, 6, 9])  # 30 examples, 7 classes
    counts = np.stack([np.bincount(labels[order]) for order in drawn(labels, 7)])
    assert set(counts.ravel()) == {4, 5}
    np.testing.assert_array_equal(counts.sum(axis=0), 30)


def test_every_example_of_a_class_comes_before_one_comes_again():
    order = drawn(LABELS, 14).ravel()
    for label, members in [(1, 3), (2, 26), (4, 70)]:
        times = np.bincount(order, minlength=100)[label == LABELS]
        assert len(times) == members
        np.testing.assert_array_equal(np.ptp(times), 0 if 14 * 25 % members == 0 else 1)
        assert times.sum() == 14 * 25


def test_an_epoch_is_a_function_of_seed_and_epoch():
    np.testing.assert_array_equal(
        class_balanced_order(LABELS, 5, 2), class_balanced_order(LABELS, 5, 2)
    )
    others = [class_balanced_order(LABELS, 6, 2), class_balanced_order(LABELS, 5, 3)]
    assert not any(np.array_equal(class_balanced_order(LABELS, 5, 2), other) for other in others)


def test_the_order_is_that_of_every_version():
    labels = np.array([0, 0, 0, 0, 1, 2, 0, 1])
    expected = [[0, 4, 5, 7, 2, 5, 5, 7], [1, 5, 6, 3, 5, 4, 4, 7]]
    np.testing.assert_array_equal(drawn(labels, 2, seed=3), expected)


def test_classes_are_spread_over_the_epoch():
    order = np.concatenate(drawn(np.repeat(np.arange(4), [1, 9, 190, 200]), 4))
    labels = np.repeat(np.arange(4), [1, 9, 190, 200])[order]
    halves = [np.bincount(half, minlength=4) / 50 for half in labels.reshape(8, -1)]
    assert np.abs(np.array(halves) - 1).max() < 0.4


def test_balanced_classes_become_a_permutation():
    labels = np.arange(60) % 6
    for order in drawn(labels, 2):
        np.testing.assert_array_equal(np.sort(order), np.arange(60))


def test_no_examples():
    with pytest.raises(UserError, match="choose a split that has some"):
        class_balanced_order(np.zeros(0, np.int32), 0, 0)
