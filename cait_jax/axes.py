"""A mesh's axes, for what runs on one and for what makes one: their names, and work by device."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")  # over which the images of a batch are divided


def by_device(function: Callable[..., Any], divided: int) -> Callable[..., Any]:
    """The function, where a mesh is set, of each device's images by themselves.

    An axis `tensor` has the same done on each of its devices.

    Args:
      function: of arrays, the first ones with the batch as their first axis, as its result has it.
      divided: how many are the first ones; of the others each device has the whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    images = PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names))

    def mapped(*arguments: Any) -> Any:
        whole = (PartitionSpec(),) * (len(arguments) - divided)
        return jax.shard_map(
            function,
            in_specs=(images,) * divided + whole,
            out_specs=images,
            check_vma=False,
        )(*arguments)

    return mapped


def on_every_device(tree: Any) -> Any:
    """The arrays of a tree, pinned to be replicated over the mesh that is set; unchanged without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)
