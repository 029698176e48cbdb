"""The average of the parameters of several checkpoints or runs."""

from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from cait_jax.errors import UserError
from cait_jax.sharding import leaf_shapes


def mean_params(trees: Iterable[Any]) -> Any:
    """The mean of parameter trees, such as of a run's last checkpoints or of several runs.

    Over fine-tunings of one start this is the uniform soup of Wortsman et al., arXiv 2203.05482, section 2.
    Sums are float64, whatever the parameters are.

    Args:
      trees: parameter trees of one model; an iterator is read one tree at a time.

    Returns:
      The mean, a tree of numpy arrays of the parameters' own dtypes.

    Raises:
      UserError: for no tree, or for one whose names, shapes or dtypes differ from the first's.
    """
    sums: Any = None
    like: Any = None
    count = 0
    for count, tree in enumerate(trees, start=1):
        if sums is None:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)
        else:
            _check_alike(tree, like, count)
        sums = jax.tree.map(lambda total, leaf: total + np.asarray(leaf, np.float64), sums, tree)
    if not count:
        raise UserError("there is nothing to average: give at least one tree of parameters")
    return jax.tree.map(lambda total, kind: (total / count).astype(kind.dtype), sums, like)


def _check_alike(tree: Any, like: Any, number: int) -> None:
    found, wanted = leaf_shapes(tree), leaf_shapes(like)
    for path in sorted(found.keys() ^ wanted.keys()):
        where = "it alone has" if path in found else "it lacks"
        raise UserError(
            f"tree {number} cannot be averaged with the first, for {where} {path}: give parameters of "
            "one model, all stacked or all unrolled"
        )
    for path, leaf in found.items():
        if leaf != wanted[path]:
            raise UserError(
                f"tree {number} cannot be averaged with the first, for {path} is {leaf} and was "
                f"{wanted[path]}: give parameters of one model"
            )
