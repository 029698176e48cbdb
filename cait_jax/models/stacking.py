"""Stacked blocks: one `nn.scan`, whose parameters have a leading depth axis."""

import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import ExampleIds, Tokens

_SINGLE = re.compile(r"blocks_(\d+)")


def scan_blocks(
    block: nn.Module,
    depth: int,
    x: Tokens,
    example_ids: ExampleIds,
    drop_path_scales: Float[Array, "depth"] | None,
) -> Tokens:
    """Applies a block `depth` times, each time with parameters, draws and a drop path scale of its own."""
    scan = nn.scan(
        lambda block, x, scale: (block(x, example_ids, 1.0 if scale is None else scale), None),
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True, "dropout": True, "drop_path": True},
        length=depth,
    )
    return scan(block, x, drop_path_scales)[0]


def unstack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Splits the parameters `blocks` of a model with `stacked=True` into `blocks_0`, `blocks_1`, ..."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    single = {
        f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(depth)
    }
    return rest | single


def stack_blocks(params: Mapping[str, Any]) -> dict[str, Any]:
    """Joins the parameters `blocks_0`, `blocks_1`, ... into `blocks`: the inverse of `unstack_blocks`."""
    names = sorted(
        (name for name in params if _SINGLE.fullmatch(name)), key=lambda name: int(name[7:])
    )
    rest = {name: value for name, value in params.items() if name not in names}
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {"blocks": blocks}
