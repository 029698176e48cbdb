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
    """The rows of the global batches that one process holds."""

    batch_size: int
    process_index: int
    process_count: int
    start_step: int = 0

    @property
    def local_size(self) -> int:
        """Rows of a batch that this process holds."""
        return self.batch_size // self.process_count

    def position(self, index: int) -> int:
        """Position, over all processes, of the example that is this process's `index`-th."""
        step, row = divmod(index, self.local_size)
        first = (self.start_step + step) * self.batch_size
        return first + self.process_index * self.local_size + row

    def positions(self, step: int) -> Int64[np.ndarray, "b"]:
        """Positions of the rows of the batch `step` after `start_step`."""
        first = self.position(step * self.local_size)
        return np.arange(first, first + self.local_size, dtype=np.int64)


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
        """The examples at rising positions."""
        epochs, places = np.divmod(positions, self.count)
        chosen = np.empty(len(positions), np.int64)
        for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
            here = epochs == epoch
            chosen[here] = self.order(epoch)[places[here] // self.repeats]
        return chosen
