"""Which example stands where: the order of training as a function of seed and step alone."""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

# From an epoch, counted from 0, to the indices of all its examples.
Order = Callable[[int], np.ndarray]

SHUFFLING, CROPPING = 0, 1
"""Purposes of draws, each with streams of its own."""


@dataclass(frozen=True)
class Rows:
    """The rows of the global batches that one process holds.

    Attributes:
      batch_size: rows of a global batch.
      process_index: which process this is.
      process_count: processes that share a global batch.
      start_step: step of the first batch.
      group_rows: rows that are mixed with each other, see `grouped_positions`; 0: rows are in the order of their
        positions.
    """

    batch_size: int
    process_index: int
    process_count: int
    start_step: int = 0
    group_rows: int = 0

    @property
    def local_size(self) -> int:
        """Rows of a batch that this process holds."""
        return self.batch_size // self.process_count

    def position(self, index: int) -> int:
        """Position, over all processes, of the example that is this process's `index`-th."""
        step, row = divmod(index, self.local_size)
        first = (self.start_step + step) * self.batch_size
        return first + int(self._places[row])

    def positions(self, step: int) -> Int64[np.ndarray, "b"]:
        """Positions of the rows of the batch `step` after `start_step`."""
        return (self.start_step + step) * self.batch_size + self._places

    @property
    def _places(self) -> Int64[np.ndarray, "b"]:
        """Positions of this process's rows within a batch."""
        first = self.process_index * self.local_size
        return grouped_positions(self.batch_size, self.group_rows)[first : first + self.local_size]


@functools.lru_cache(maxsize=16)
def grouped_positions(batch_size: int, group_rows: int) -> Int64[np.ndarray, "batch_size"]:
    """Which position of a batch stands in each of its rows, when groups of rows are mixed with each other.

    Rows `[g * group_rows, (g + 1) * group_rows)` are group g; a remainder is one more group. Positions are dealt
    to the groups in turn, as a distributed sampler deals them to processes, and a full group is passed over. So
    consecutive positions, which hold the copies of an image under repeated augmentation, are in different groups
    if there are as many full groups as copies.

    Args:
      batch_size: rows of the batch.
      group_rows: rows of a group; 0, or as many as the batch has: one group, positions in order.

    Returns:
      A permutation of `range(batch_size)`, int64, read-only.
    """
    places = np.arange(batch_size, dtype=np.int64)
    if 0 < group_rows < batch_size:
        groups, rest = divmod(batch_size, group_rows)
        # While the smaller last group takes part, then without it.
        shared = rest * (groups + bool(rest))
        turns = np.concatenate(
            [places[:shared] % (groups + bool(rest)), (places[shared:] - shared) % groups]
        )
        places = np.argsort(turns, kind="stable")
    places.flags.writeable = False
    return places


def copies_in_a_group(batch_size: int, group_rows: int, repeats: int) -> int:
    """Rows of a batch that are in one group with another copy of their image.

    Args:
      batch_size: rows of the batch, the first of which starts a new image.
      group_rows: as in `grouped_positions`.
      repeats: copies of an image in consecutive positions.
    """
    group = np.arange(batch_size) // (group_rows or batch_size)
    image = grouped_positions(batch_size, group_rows) // repeats
    _, counts = np.unique(group * batch_size + image, return_counts=True)
    return int(counts[counts > 1].sum())


def philox(seed: int, number: int, purpose: int) -> np.random.Philox:
    """The stream for a purpose: each seed and number has one that shares no draws with another."""
    key = np.array([seed % 2**64, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64))


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    """The order of the examples in an epoch.

    It sorts raw words of Philox, the one stream that NumPy promises to keep in every version.

    Args:
      seed: the seed of the run.
      epoch: the epoch, counted from 0.
      count: the number of examples.

    Returns:
      The numbers from 0 to `count - 1`, int64, not to be written to.
    """
    words = philox(seed, epoch, SHUFFLING).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


@dataclass(frozen=True)
class Chosen:
    """Which example stands at a position of training."""

    order: Order
    count: int
    repeats: int

    def candidates(self, position: int) -> Iterator[int]:
        """The example at `position`, and those that stand in for it, in their order."""
        epoch, place = divmod(position, self.count)
        order, first = self.order(epoch), place // self.repeats
        return (int(order[(first + i) % self.count]) for i in range(self.count))

    def at(self, positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """The examples at positions of a few epochs."""
        epochs, places = np.divmod(positions, self.count)
        chosen = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self.order(epoch)[places[here] // self.repeats]
        return chosen
