"""Which example stands in which row, and which rows are mixed with each other."""

import numpy as np
import pytest

from cait_jax.data.order import Rows, copies_in_a_group, grouped_positions
from cait_jax.data.pipeline import train_batches
from cait_jax.data.sources import InMemory


def numbered(count):
    """A split whose image i holds the number i."""
    images = np.arange(count)[:, None] // np.array([1, 256]) % 256
    return InMemory(
        images.astype(np.uint8).reshape(count, 1, 2, 1), np.zeros(count, np.int32), ("one",)
    )


def mixed_with_a_copy(examples, rows):
    """Rows whose group holds another copy of their example, and rows mixed with their own example."""
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
    assert Rows(64, 1, 2, 5).position(3) == 5 * 64 + 32 + 3
    assert copies_in_a_group(1024, 0, 3) == 1023
    assert copies_in_a_group(128, 64, 1) == 0


def test_too_few_groups_are_counted():
    """Two groups and three copies: two copies of every image share one, or three."""
    assert copies_in_a_group(126, 63, 3) == 84


def test_rows_of_a_process_are_those_of_the_whole():
    whole = Rows(96, 0, 1, 7, group_rows=32)
    for index in range(3):
        part = Rows(96, index, 3, 7, group_rows=32)
        expected = whole.positions(2)[index * 32 : (index + 1) * 32]
        np.testing.assert_array_equal(part.positions(2), expected)
        assert [part.position(64 + row) for row in range(32)] == expected.tolist()
