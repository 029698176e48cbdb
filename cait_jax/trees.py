"""Trees of arrays in words."""

from typing import Any

import jax
import numpy as np


def by_name(tree: Any) -> dict[str, str]:
    """Name to dtype and shape of each leaf, such as `"params/head/kernel"` to `"float32 (192, 10)"`.

    Args:
      tree: of arrays, or of anything with a dtype and a shape.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}"
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
