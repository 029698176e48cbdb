import numpy as np
import pytest

from cait_jax.data.balance import balanced_order
from cait_jax.errors import UserError

# 100 examples of four classes, in no order; class 3 has none.
LABELS = np.random.default_rng(0).permutation(np.repeat([0, 1, 2, 4], [1, 3, 26, 70]))


def drawn(labels, epochs, seed=0):
    return np.stack([balanced_order(labels, seed, epoch) for epoch in range(epochs)])


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
    np.testing.assert_array_equal(balanced_order(LABELS, 5, 2), balanced_order(LABELS, 5, 2))
    others = [balanced_order(LABELS, 6, 2), balanced_order(LABELS, 5, 3)]
    assert not any(np.array_equal(balanced_order(LABELS, 5, 2), other) for other in others)


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
        balanced_order(np.zeros(0, np.int32), 0, 0)
