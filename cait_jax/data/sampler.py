"""The order of training examples as a function of seed and step alone.

Positions count the rows of all global batches: position `p` is example `order(p // n)[p % n // repeats]` of a
split of `n` examples.
"""

import functools
import logging
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int, Int64

from cait_jax.errors import UserError

_log = logging.getLogger(__name__)

# Counters of the Philox streams, by purpose.
SHUFFLING, CROPPING = 0, 1
# Streams of single classes come after those of any epoch.
_CLASS_STREAMS = 2**40


@dataclass(frozen=True, eq=False)
class Sampler:
    """Every epoch is a permutation of the `count` examples.

    With `repeats` r an example is shown r times in a row, and an epoch of `count` positions holds the first 1/r of
    its permutation (repeated augmentation, Hoffer et al., arXiv 1901.09335). With `labels`, one for each example,
    every class comes equally often in every epoch, see `class_balanced_order`.
    """

    seed: int
    count: int
    repeats: int = 1
    labels: Int[np.ndarray, "count"] | None = None

    def order(self, epoch: int) -> Int64[np.ndarray, "count"]:
        """Indices of the examples in their order in an epoch, counted from 0."""
        if self.labels is None:
            return permutation(self.seed, epoch, self.count)
        return _class_balanced_order(self, epoch)

    def indices(self, positions: Int64[np.ndarray, "b"]) -> Int64[np.ndarray, "b"]:
        """The examples at some positions."""
        epochs, places = np.divmod(positions, self.count)
        indices = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs).tolist():
            inside = epochs == epoch
            indices[inside] = self.order(epoch)[places[inside] // self.repeats]
        return indices

    def candidates(self, position: int) -> Iterator[int]:
        """The example at `position`, then those that replace it if it is broken."""
        epoch, place = divmod(position, self.count)
        order, first = self.order(epoch), place // self.repeats
        return (int(order[(first + i) % self.count]) for i in range(self.count))


@functools.lru_cache(maxsize=2)
def _class_balanced_order(sampler: Sampler, epoch: int) -> Int64[np.ndarray, "n"]:
    return class_balanced_order(sampler.labels, sampler.seed, epoch)


def class_balanced_order(
    labels: Int[np.ndarray, "n"], seed: int, epoch: int
) -> Int64[np.ndarray, "n"]:
    """The order of an epoch in which all classes that have examples come equally often.

    Of n draws over C classes each class has `n // C`, and `n % C` classes, in turn from epoch to epoch, have one
    more. A class goes through all its examples, reshuffled each time, before one comes again, and continues in the
    next epoch where it stopped.

    Raises:
      UserError: without examples.
    """
    if not len(labels):
        raise UserError("classes of no examples cannot be balanced: choose a split that has some")
    classes, counts = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    streams = len(classes)

    def drawn(turn: int, which: int) -> Int64[np.ndarray, "drawn"]:
        # Of the draws of all epochs in a row, the class has the numbers turn, turn + C, turn + 2 C, ...
        start, stop = (-(-(e * len(labels) - turn) // streams) for e in (epoch, epoch + 1))
        size = len(members[which])
        passes = [
            members[which][permutation(seed, _CLASS_STREAMS + 1 + which + streams * number, size)]
            for number in range(start // size, -(-stop // size))
        ]
        skipped = start // size * size
        return np.concatenate(passes)[start - skipped : stop - skipped]

    turns = permutation(seed, _CLASS_STREAMS, streams).tolist()
    indices = np.concatenate([drawn(turn, which) for turn, which in enumerate(turns)])
    order: np.ndarray = indices[permutation(seed, epoch, len(labels))]
    return order


@functools.lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, count: int) -> Int64[np.ndarray, "count"]:
    """The order of `count` examples in an epoch; read-only.

    It sorts raw words of Philox, the one stream that NumPy promises to keep in every version.
    """
    words = philox(seed, epoch, SHUFFLING).random_raw(count)
    order = np.argsort(words, kind="stable")
    order.flags.writeable = False
    return order


def philox(seed: int, number: int, purpose: int) -> np.random.Philox:
    """The stream of a purpose: no two seeds, numbers or purposes share draws."""
    key = np.array([seed % 2**64, number], np.uint64)
    return np.random.Philox(key=key, counter=np.array([0, 0, 0, purpose], np.uint64))


@dataclass(frozen=True)
class BatchSlice:
    """The rows of every global batch that one process holds.

    Attributes:
      batch_size: rows of a global batch.
      start_step: step of the first batch.
      group_rows: rows that are mixed with each other, see `grouped_positions`.
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
        """Position, over all processes, of this process's example number `index`."""
        step, row = divmod(index, self.local_size)
        return (self.start_step + step) * self.batch_size + int(self._places[row])

    def positions(self, step: int) -> Int64[np.ndarray, "b"]:
        """Positions of the rows of the batch `step` after `start_step`."""
        return (self.start_step + step) * self.batch_size + self._places

    @property
    def _places(self) -> Int64[np.ndarray, "b"]:
        first = self.process_index * self.local_size
        return grouped_positions(self.batch_size, self.group_rows)[first : first + self.local_size]


@functools.lru_cache(maxsize=16)
def grouped_positions(batch_size: int, group_rows: int) -> Int64[np.ndarray, "batch_size"]:
    """The position within a batch of each of its rows, when groups of rows are mixed with each other; read-only.

    Rows `[g * group_rows, (g + 1) * group_rows)` are group g; a remainder is one more group, and `group_rows` 0 is
    one group of all rows in order. Positions are dealt to the groups in turn, as a distributed sampler deals them
    to processes, and a full group is passed over. So the copies of an image, which have consecutive positions, are
    in different groups if there are as many full groups as copies.
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

    The first row of the batch starts a new image, of which `repeats` copies have consecutive positions.
    """
    group = np.arange(batch_size) // (group_rows or batch_size)
    image = grouped_positions(batch_size, group_rows) // repeats
    _, counts = np.unique(group * batch_size + image, return_counts=True)
    return int(counts[counts > 1].sum())


def warn_of_shared_draws(batch_size: int, group_rows: int, repeats: int) -> None:
    """Logs how many rows share their mixup or CutMix draw with another copy of their image."""
    shared = copies_in_a_group(batch_size, group_rows, repeats)
    if shared:
        _log.warning(
            "%d of the %d rows of a batch share their mixup or CutMix draw with another copy of their image: "
            "data.aug_repeats=%d needs as many groups, and augment.mix_rows=%d makes %d",
            shared,
            batch_size,
            repeats,
            group_rows,
            -(-batch_size // (group_rows or batch_size)),
        )
