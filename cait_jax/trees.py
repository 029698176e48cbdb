"""Trees of arrays in words."""

from typing import Any

import jax
import numpy as np


def names_and_leaves(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Each leaf with its name, such as `"params/head/kernel"`; and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return named, structure


def by_name(tree: Any) -> dict[str, str]:
    """Name to dtype and shape of each leaf, such as `"params/head/kernel"` to `"float32 (192, 10)"`.

    Args:
      tree: of arrays, or of anything with a dtype and a shape.
    """
    named, _ = names_and_leaves(tree)
    return {name: f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}" for name, leaf in named}
