"""An order of examples in which every class comes equally often."""

import dataclasses
import functools

import numpy as np
from jaxtyping import Int, Int64

from cait_jax.data.order import permutation
from cait_jax.errors import UserError

# Streams of classes start past those of any epoch.
_FIRST_OF_CLASSES = 2**40


@dataclasses.dataclass(frozen=True, eq=False)
class Balanced:
    """`balanced_order` of given labels and seed as a function of the epoch, for `train_batches`.

    Attributes:
      labels: int (n,), of the split's examples.
      seed: the seed of the run.
    """

    labels: np.ndarray = dataclasses.field(repr=False)
    seed: int

    def __call__(self, epoch: int) -> Int64[np.ndarray, "n"]:
        """The order of an epoch, kept until a later one is asked for."""
        return _cached(self, epoch)


@functools.lru_cache(maxsize=2)
def _cached(balanced: Balanced, epoch: int) -> Int64[np.ndarray, "n"]:
    return balanced_order(balanced.labels, balanced.seed, epoch)


def balanced_order(labels: Int[np.ndarray, "n"], seed: int, epoch: int) -> Int64[np.ndarray, "n"]:
    """The order of the examples in an epoch, with as many of each class.

    An epoch of n draws over C classes has `n // C` of each, and one more of `n % C` classes, which take turns
    from epoch to epoch. A class goes through all its examples, in a new order every time, before one comes
    again, and goes on in the next epoch where it stopped. So examples of rare classes come several times
    an epoch, and those of frequent ones not in every epoch.

    Args:
      labels: of the split's examples. Classes without examples do not count.
      seed: the seed of the run.
      epoch: counted from 0.

    Returns:
      Indices of examples, int64: a function of the arguments alone, in every version of NumPy.

    Raises:
      UserError: without examples.
    """
    if not len(labels):
        raise UserError("classes of no examples cannot be balanced: choose a split that has some")
    classes, counts = np.unique(labels, return_counts=True)
    members = np.split(np.argsort(labels, kind="stable"), np.cumsum(counts)[:-1])
    turns = permutation(seed, _FIRST_OF_CLASSES, len(classes))
    chosen = [
        _drawn(
            members[which],
            seed,
            _FIRST_OF_CLASSES + 1 + int(which),
            len(classes),
            _draws_before(epoch, turn, len(labels), len(classes)),
            _draws_before(epoch + 1, turn, len(labels), len(classes)),
        )
        for turn, which in enumerate(turns)
    ]
    return np.concatenate(chosen)[permutation(seed, epoch, len(labels))]


def _draws_before(epoch: int, turn: int, examples: int, classes: int) -> int:
    """How often the class whose turn this is was drawn in all epochs before `epoch`.

    Of the draws of all epochs in one row, class `turn` of `classes` has number turn, turn + classes, ...
    """
    return (epoch * examples + classes - 1 - turn) // classes


def _drawn(
    members: Int64[np.ndarray, "members"],
    seed: int,
    stream: int,
    streams: int,
    start: int,
    stop: int,
) -> Int64[np.ndarray, "drawn"]:
    """The draws `start` to `stop` of a class: its members in one shuffled pass after another."""
    count = len(members)
    first = start // count
    passes = [
        members[permutation(seed, stream + streams * number, count)]
        for number in range(first, -(-stop // count))
    ]
    return np.concatenate(passes)[start - first * count : stop - first * count]
