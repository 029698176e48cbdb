"""Attention on a mesh: each device does its own images."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

from cait_jax.axes import BATCH_AXES


def by_device(attention: Callable[..., Any]) -> Callable[..., Any]:
    """The attention, where a mesh is set, of each device's images by themselves.

    All heads and tokens of an image stay together: what mixes heads needs all. So an axis `tensor` has the same
    done on each of its devices.

    Args:
      attention: of q, k and v, (batch, tokens, heads, dim) each, and four small arrays.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attention
    images = PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names))
    return jax.shard_map(
        attention,
        in_specs=(images,) * 3 + (PartitionSpec(),) * 4,
        out_specs=images,
        check_vma=False,
    )
