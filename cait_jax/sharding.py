"""The mesh of devices, and how batches and states lie on it.

The mesh has three axes. `data`: each device has other images, and the same parameters. `fsdp`: each has other
images and a part of every large parameter, which is gathered where it is needed (Rajbhandari et al., arXiv
1910.02054, stage 3). `tensor`: devices share the images and divide the work of one layer (Shoeybi et al., arXiv
1909.08053). Models know nothing of it: `RULES` place a parameter by its name.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from cait_jax.axes import AXES, BATCH_AXES
from cait_jax.errors import UserError
from cait_jax.interface import setting
from cait_jax.trees import names_and_leaves

# How the last axes of an array lie, by its name's end; the first that fits counts, what fits none is on every
# device. Axes before those (a stack of blocks) are whole.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"patch_embed/proj/kernel", ("fsdp",)),
    (r"(qkv|q|k|v|fc1|head|head_dist)/kernel", ("fsdp", "tensor")),
    (r"(proj|fc2)/kernel", ("tensor", "fsdp")),
    (r"(qkv|q|k|v|fc1|head|head_dist)/bias", ("tensor",)),
    (r"pos_embed", ("fsdp",)),
    (r"conv\w*/kernel", ("fsdp",)),
)


def make_mesh(
    devices: list[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`.

    Args:
      devices: the devices; all of them if not given.
      data: size of the axis; of one axis it may be -1, which is what the others leave.
      fsdp: likewise.
      tensor: likewise; the devices that share images must belong to one process.

    Raises:
      UserError: the sizes do not make up the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    filled = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    said = ", ".join(f"{setting(f'config.mesh.{name}', size)}" for name, size in sizes.items())
    if len(filled) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{said} is no mesh: every size must be 1 or more, and one of them may be -1, which takes "
            "the devices that are left"
        )
    if len(devices) % known or (not filled and known != len(devices)):
        raise UserError(
            f"{said} does not fit {len(devices)} device(s): the sizes must multiply to that; leave "
            f"{setting('config.mesh.data', -1)} to fill what is left"
        )
    if filled:
        sizes[filled[0]] = len(devices) // known
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % sizes["tensor"]:
        raise UserError(
            f"{setting('config.mesh.tensor', sizes['tensor'])} does not divide the {local} device(s) of a "
            "process, and the devices that share images must be in one: choose a divisor, or more of "
            f"{setting('config.mesh.fsdp')}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def over_batch(mesh: Mesh) -> NamedSharding:
    """The first axis is divided, in its order, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def placed(tree: Any, mesh: Mesh) -> Any:
    """How each array of a tree lies on a mesh, by `RULES`.

    The name is the path, so what an optimiser or an average keeps of a parameter lies as the parameter does. An
    axis of an array that a mesh axis does not divide stays whole.

    Args:
      tree: arrays or shapes: parameters, or a whole training state.
      mesh: of `make_mesh`.

    Returns:
      The same tree of shardings.
    """
    names, structure = names_and_leaves(tree)
    shardings = [NamedSharding(mesh, _spec(name, leaf.shape, mesh)) for name, leaf in names]
    return jax.tree.unflatten(structure, shardings)


def _spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", name) and len(axes) <= len(shape):
            whole = (None,) * (len(shape) - len(axes))
            fitting = (
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape[len(whole) :], strict=True)
            )
            return PartitionSpec(*whole, *fitting)
    return PartitionSpec()


def batch_divided(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """The function, with every module that it traces keeping its batch divided over `data` and `fsdp`.

    Without this the compiler may as well divide the channels, as the parameters are, and gather the batch. Inside,
    the mesh is set, for kernels that each device runs on its own images.

    Args:
      function: applies Flax modules, whose outputs have the batch as their first axis.
      mesh: of `make_mesh`.
    """
    if mesh.size == 1:
        return function

    def pin(array: Any) -> Any:
        free = (PartitionSpec.UNCONSTRAINED,) * (array.ndim - 1)
        spec = PartitionSpec(BATCH_AXES, *free)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        return jax.tree.map(pin, output)

    @functools.wraps(function)
    def divided(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.intercept_methods(interceptor):
            return function(*args, **kwargs)

    return divided


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """Makes global arrays of this process's rows.

    Args:
      batch: arrays of this process's rows, in the order of the process's devices.
      sharding: as `over_batch` gives it.

    Returns:
      The global arrays.
    """
    if jax.process_count() == 1:  # a third of the time that the general way takes
        return jax.device_put(dict(batch), sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def batch_parts(mesh: Mesh) -> int:
    """Into how many parts a batch is divided."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def shared_size(batch_size: int, mesh: Mesh) -> int:
    """The next size of a batch, from `batch_size` up, that the devices share evenly."""
    return -(-batch_size // batch_parts(mesh)) * batch_parts(mesh)


def check_batch_size(batch_size: int, devices: int, accumulate: int = 1) -> None:
    """Refuses a batch that the devices cannot share evenly.

    Args:
      batch_size: images a step over all devices.
      devices: into how many parts a batch is divided, see `batch_parts`.
      accumulate: micro batches a step.

    Raises:
      UserError: naming the numbers.
    """
    parts = devices * accumulate
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} must be a multiple of {parts} ({devices} devices times "
            f"{accumulate} micro batches): set "
            f"{setting('config.batch_size', max(1, batch_size // parts) * parts)}"
        )
