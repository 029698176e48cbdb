"""Parameters of stacked blocks (one leading depth axis) to parameters of single blocks, and back."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

_SINGLE = re.compile(r"blocks_(\d+)")


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits `blocks`, whose leaves have a leading depth axis, into `blocks_0`, `blocks_1`, ...

    Args:
      params: parameters of a model with `stacked=True`.

    Returns:
      The same numbers as a model with `stacked=False` takes them.
    """
    rest = {name: value for name, value in params.items() if name != "blocks"}
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    single = {
        f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(depth)
    }
    return rest | single


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Joins `blocks_0`, `blocks_1`, ... into `blocks` along a new leading axis: undoes `unstack_blocks`.

    Args:
      params: parameters of a model with `stacked=False`.

    Returns:
      The same numbers as a model with `stacked=True` takes them.
    """
    names = sorted(
        (name for name in params if _SINGLE.fullmatch(name)), key=lambda name: int(name[7:])
    )
    rest = {name: value for name, value in params.items() if name not in names}
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {"blocks": blocks}
