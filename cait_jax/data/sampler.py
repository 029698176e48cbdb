"""The order of training examples as a function of seed and step alone.

Positions count the rows of all global batches: position `p` is example `order(p // n)[p % n // repeats]` of a
split of `n` examples.
"""

import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, Int64

from cait_jax.errors import UserError

_log = logging.getLogger(__name__)

# Counters of the Philox streams, by purpose.
SHUFFLING, CROPPING = 0, 1
# The largest split whose epochs are lists. Those of larger ones are computed place by place.
LISTED = 2**22
# Of Grain's cipher. With the four of Grain's own shuffle, batches are measurably not uniform.
_ROUNDS = 16
# Streams of single classes come after those of any epoch.
_CLASS_STREAMS = 2**40


@dataclass(frozen=True, eq=False)
class Sampler:
    """Every epoch is a permutation of the `count` examples, listed or, above `LISTED`, `shuffled`.

    With `repeats` r an example is shown r times in a row, and an epoch of `count` positions holds the first 1/r of
    its permutation (repeated augmentation, Hoffer et al., arXiv 1901.09335). With the `labels` of all examples, an
    epoch is `class_balanced_order`.
    """

    seed: int
    count: int
    repeats: int = 1
    labels: Int[np.ndarray, "count"] | None = None

    def order(self, epoch: int) -> "Int64[np.ndarray, 'count'] | Shuffled":
        """Indices of the examples, by their places in an epoch; epochs are counted from 0."""
        order: np.ndarray | Shuffled = _order(self, epoch)
        return order

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
def _order(sampler: Sampler, epoch: int) -> Any:
    if sampler.labels is not None:
        return class_balanced_order(sampler.labels, sampler.seed, epoch)
    if sampler.count > LISTED:
        return Shuffled(sampler.seed, epoch, sampler.count)
    return permutation(sampler.seed, epoch, sampler.count)


class Shuffled:
    """The order of `count` examples in an epoch, by Grain's index shuffle: a few microseconds a place, no list.

    Grain takes a key of 32 bits, which is drawn for each seed and epoch.
    """

    def __init__(self, seed: int, epoch: int, count: int) -> None:
        from grain.experimental import index_shuffle

        key = int(philox(seed, epoch, SHUFFLING).random_raw()) >> 32
        at = functools.partial(index_shuffle, max_index=count - 1, seed=key, rounds=_ROUNDS)
        self._at = np.vectorize(at, otypes=[np.int64])

    def __getitem__(self, places: Any) -> Any:
        """The indices at some places, int64; an array of the shape of `places`."""
        return self._at(places)


def recorded_order(count: int, *, balanced: bool) -> Mapping[str, str]:
    """What a checkpoint records of the order of `count` examples; nothing of one that is a list."""
    return {"order": "index_shuffle"} if count > LISTED and not balanced else {}


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
    _, counts = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    streams = len(members)
    indices = []
    for turn, which in enumerate(permutation(seed, _CLASS_STREAMS, streams).tolist()):
        # Of the draws of all epochs in a row, the class has the numbers turn, turn + C, turn + 2 C, ...
        start, stop = (-(-(e * len(labels) - turn) // streams) for e in (epoch, epoch + 1))
        size = len(members[which])
        first = start // size
        passes = [
            members[which][permutation(seed, _CLASS_STREAMS + 1 + which + streams * number, size)]
            for number in range(first, -(-stop // size))
        ]
        indices.append(np.concatenate(passes)[start - first * size : stop - first * size])
    order: np.ndarray = np.concatenate(indices)[permutation(seed, epoch, len(labels))]
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
    """The rows of every global batch from `start_step` on that one process holds; see `grouped_positions`."""

    batch_size: int
    process_index: int
    process_count: int
    start_step: int = 0
    group_rows: int = 0

    @property
    def local_size(self) -> int:
        """Rows of a batch that this process holds."""
        return self.batch_size // self.process_count

    def position(self, number: Any) -> Any:
        """Position, over all processes, of this process's example `number`, or those of an array of numbers."""
        step, row = np.divmod(number, self.local_size)
        places = grouped_positions(self.batch_size, self.group_rows)
        place = places[self.process_index * self.local_size + row]
        return (self.start_step + step) * self.batch_size + place


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
        full, rest = divmod(batch_size, group_rows)
        groups = full + bool(rest)
        # While the smaller last group takes part, then without it.
        shared = rest * groups
        turns = np.where(places < shared, places % groups, (places - shared) % full)
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
    if shared := copies_in_a_group(batch_size, group_rows, repeats):
        _log.warning(
            f"{shared} of the {batch_size} rows of a batch share their mixup or CutMix draw with another copy of "
            f"their image: data.aug_repeats={repeats} needs as many groups, and augment.mix_rows={group_rows} "
            f"makes {-(-batch_size // (group_rows or batch_size))}"
        )
