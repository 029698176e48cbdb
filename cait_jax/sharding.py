"""The device mesh, and the shardings of batches and states on it.

The mesh has three axes. `data`: devices differ in images and share parameters. `fsdp`: devices differ in images,
and each holds a shard of every large parameter, which is all-gathered where it is used (Rajbhandari et al., arXiv
1910.02054, stage 3). `tensor`: devices share images and split the work of each layer (Shoeybi et al., arXiv
1909.08053). Models do not know the mesh: `RULES` shard a parameter by its path.
"""

import contextlib
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from cait_jax.errors import UserError, Way, advise, can_set, setting

AXES = ("data", "fsdp", "tensor")
BATCH_AXES = ("data", "fsdp")

# Mesh axes of the last axes of an array, by the end of its path; the first match counts, and what matches none
# is replicated. Leading axes, such as that of stacked blocks, are not sharded.
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"patch_embed/proj/kernel", ("fsdp",)),
    (r"(qkv|q|k|v|fc1|last|head|head_dist)/kernel", ("fsdp", "tensor")),
    (r"(proj|fc2)/kernel", ("tensor", "fsdp")),
    (r"(qkv|q|k|v|fc1|head|head_dist)/bias", ("tensor",)),
    (r"pos_embed", ("fsdp",)),
    (r"(embed|pixels)/kernel", ("fsdp",)),
    (r"conv\w*/kernel", ("fsdp",)),
)


def make_mesh(
    devices: list[jax.Device] | None = None, *, data: int = -1, fsdp: int = 1, tensor: int = 1
) -> Mesh:
    """A mesh with the axes `data`, `fsdp` and `tensor`, of which one may be -1 for the remaining devices.

    Raises:
      UserError: the sizes do not multiply to the number of devices, or `tensor` spans processes.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(len(devices), data=data, fsdp=fsdp, tensor=tensor)
    local = sum(device.process_index == devices[0].process_index for device in devices)
    if local % sizes["tensor"]:
        raise UserError(
            f"{setting('config.mesh.tensor', sizes['tensor'])} does not divide the {local} device(s) of a "
            "process, and the devices that share images must be in one: choose a divisor, or more of "
            f"{setting('config.mesh.fsdp')}"
        )
    return jax.make_mesh(tuple(sizes.values()), AXES, (AxisType.Auto,) * 3, devices=devices)


def mesh_sizes(devices: int, *, data: int = -1, fsdp: int = 1, tensor: int = 1) -> dict[str, int]:
    """The sizes of the mesh axes over so many devices, one of them being -1 for the remaining devices.

    Raises:
      UserError: they do not multiply to the number of devices.
    """
    sizes = dict(zip(AXES, (data, fsdp, tensor), strict=True))
    inferred = [name for name, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    given = ", ".join(f"{setting(f'config.mesh.{name}', size)}" for name, size in sizes.items())
    if len(inferred) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(
            f"{given} is no mesh: every size must be 1 or more, and one of them may be -1, which takes "
            "the devices that are left"
        )
    if devices % known or (not inferred and known != devices):
        raise UserError(
            f"{given} does not fit {devices} device(s): the sizes must multiply to that; leave "
            f"{setting('config.mesh.data', -1)} to fill what is left"
        )
    if inferred:
        sizes[inferred[0]] = devices // known
    return sizes


def replicated(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Every device holds the whole array."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The first axis is split, in order, over `data` and `fsdp`."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def param_shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of each leaf by `RULES`, for parameters or a whole training state.

    Since paths decide, the optimiser's moments and the EMA are sharded as their parameter. An array axis that the
    mesh axis does not divide is not sharded.
    """
    paths, structure = leaf_paths(tree)
    shardings = [NamedSharding(mesh, _spec(path, leaf.shape, mesh)) for path, leaf in paths]
    return jax.tree.unflatten(structure, shardings)


def _spec(path: str, shape: tuple[int, ...], mesh: Mesh) -> PartitionSpec:
    for pattern, axes in RULES:
        if re.search(rf"(^|/){pattern}$", path) and len(axes) <= len(shape):
            leading = (None,) * (len(shape) - len(axes))
            divisible = (
                axis if axis and size % mesh.shape[axis] == 0 else None
                for axis, size in zip(axes, shape[len(leading) :], strict=True)
            )
            return PartitionSpec(*leading, *divisible)
    return PartitionSpec()


def constrain_batch(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Traces `function` with the mesh set and the output of every Flax module constrained to `batch_sharding`.

    Without the constraint the compiler may shard channels, as the parameters are, and gather the batch.
    """
    if mesh.size == 1:
        return function

    def constrain(array: Any) -> Any:
        free = (PartitionSpec.UNCONSTRAINED,) * (array.ndim - 1)
        spec = PartitionSpec(BATCH_AXES, *free)
        return jax.lax.with_sharding_constraint(array, NamedSharding(mesh, spec))

    def interceptor(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        output = call(*args, **kwargs)
        if context.method_name != "__call__":
            return output
        return jax.tree.map(constrain, output)

    @functools.wraps(function)
    def constrained(*args: Any, **kwargs: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.intercept_methods(interceptor):
            return function(*args, **kwargs)

    return constrained


def shard_over_batch(function: Callable[..., Any], batched: int) -> Callable[..., Any]:
    """`shard_map`s a function over the batch where a mesh is set; devices along `tensor` repeat the work.

    Args:
      function: its first `batched` arguments and its result have the batch as first axis; other arguments are
        replicated.
      batched: number of batched arguments.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return function
    images = PartitionSpec(tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names))

    def sharded(*arguments: Any) -> Any:
        rest = (PartitionSpec(),) * (len(arguments) - batched)
        return jax.shard_map(
            function,
            in_specs=(images,) * batched + rest,
            out_specs=images,
            check_vma=False,
        )(*arguments)

    return sharded


def reshape(x: Any, *shape: Any) -> Array:
    """`x.reshape(shape)`, the batch axis of which keeps its sharding, as JAX asks for under explicit mesh axes."""
    spec = _explicit_spec(x, len(shape))
    return x.reshape(shape) if spec is None else jax.lax.reshape(x, shape, out_sharding=spec)


def tile(token: Array, like: Array) -> Array:
    """(1, 1, d) to (batch, 1, d), with the batch axis of `like`, sharded as it is under explicit mesh axes."""
    shape = (like.shape[0], *token.shape[1:])
    return jnp.broadcast_to(token, shape, out_sharding=_explicit_spec(like, 3))


def positions(batch: Any) -> Array:
    """0, 1, ... for each example, int32 (batch,), sharded as the batch under explicit mesh axes."""
    return jnp.arange(batch.shape[0], out_sharding=_explicit_spec(batch, 1))


def under_automatic_axes(function: Callable[..., Any], batch: Any, *arguments: Any) -> Any:
    """`function(batch, *arguments)`, inside of which mesh axes are automatic also where they are explicit outside.

    So its operations need not say how their results are sharded. Those of `function` are sharded as the batch axis
    of `batch`. All arrays that it uses are arguments.
    """
    spec = _explicit_spec(batch, 1)
    if spec is None:
        return function(batch, *arguments)
    return jax.sharding.auto_axes(function, out_sharding=spec)(batch, *arguments)


def _explicit_spec(x: Any, ndim: int) -> PartitionSpec | None:
    """That of the batch axis, for `ndim` axes; None where no axis of the mesh is explicit."""
    spec = tuple(jax.typeof(x).sharding.spec)
    if not spec or spec[0] is None:
        return None
    return PartitionSpec(spec[0], *[None] * (ndim - 1))


def constrain_replicated(tree: Any) -> Any:
    """The leaves, constrained to be replicated over the mesh that is set; unchanged without one."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.with_sharding_constraint(leaf, PartitionSpec()), tree)


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """Global arrays from this process's rows, which are in the order of its devices."""
    if jax.process_count() == 1:  # a third of the time that the general way takes
        on_devices: dict[str, Any] = jax.device_put(dict(batch), sharding)
        return on_devices
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }


def copy_to_host(tree: Any, buffers: Any = None) -> Any:
    """NumPy arrays that share no memory with a pytree's jax.Arrays, which may be donated.

    Args:
      buffers: an earlier result, which is overwritten if it has the same shapes and dtypes. Memory that is new to
        the process takes as long to map as to fill.
    """
    if jax.default_backend() != "cpu":
        return jax.device_get(tree)
    host = jax.tree.map(np.asarray, tree)
    spec = functools.partial(jax.tree.map, lambda array: (array.shape, array.dtype))
    if spec(buffers) != spec(host):
        return jax.tree.map(np.array, host)
    jax.tree.map(np.copyto, buffers, host)
    return buffers


def batch_shards(mesh: Mesh) -> int:
    """The number of shards of a batch."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def padded_batch_size(batch_size: int, mesh: Mesh) -> int:
    """The smallest multiple of `batch_shards` that is at least `batch_size`."""
    return -(-batch_size // batch_shards(mesh)) * batch_shards(mesh)


def check_batch_size(batch_size: int, shards: int, grad_accum: int = 1) -> None:
    """Refuses a batch that shards and micro batches do not divide.

    Raises:
      UserError: naming the numbers.
    """
    parts = shards * grad_accum
    if batch_size < 1 or batch_size % parts:
        raise UserError(
            f"batch_size {batch_size} must be a multiple of {parts} ({shards} devices times "
            f"{grad_accum} micro batches): set "
            f"{setting('config.batch_size', max(1, batch_size // parts) * parts)}"
            + (
                "; a run that goes on keeps its batch size: let devices share images, by "
                f"{setting('config.mesh.tensor', shards)}"
                if shards > 1 and can_set("config.mesh.tensor") and batch_size % grad_accum == 0
                else ""
            )
        )


def local_bytes(tree: Any) -> int:
    """Bytes on each device of arrays, or of shapes with shardings."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )


def device_memory(devices: Sequence[jax.Device]) -> int | None:
    """Bytes that each of this process's devices has; on CPUs its share of what is available; None if not known."""
    local = [device for device in devices if device.process_index == jax.process_index()]
    if not local or local[0].platform != "cpu":
        limits = [(device.memory_stats() or {}).get("bytes_limit") for device in local]
        return min((limit for limit in limits if limit), default=None)
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024 // len(local)
    return None


def check_memory(params: Any, rest: Any, devices: Sequence[jax.Device]) -> None:
    """Refuses a training state that a device cannot hold, by shapes and shardings.

    Args:
      params: they count twice, for the gradient.
      rest: what is kept beside them.

    Raises:
      UserError: with the numbers. Activations are not counted, so what passes may still be too large.
    """
    needed, available = 2 * local_bytes(params) + local_bytes(rest), device_memory(devices)
    if available is None or needed <= available:
        return
    count = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    ways = advise(
        Way("lower {}", "config.model.width"), Way("lower {}", "config.eval.batch_size"),
        Way("shard over more devices by {}", "config.mesh.fsdp"), otherwise="choose a smaller model",
    )  # fmt: skip
    raise UserError(
        f"{count:,} parameters, their gradients, the optimizer's state and a batch of images take "
        f"{needed / 1e9:,.1f} GB of each device, which has {available / 1e9:,.1f} GB: {ways}"
    )


def leaf_paths(tree: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Each leaf with its path, such as `"params/head/kernel"`; and the tree's structure."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(tree)
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves
    ]
    return named, structure


def leaf_shapes(tree: Any) -> dict[str, str]:
    """Path to dtype and shape of each leaf, such as `"params/head/kernel"` to `"float32 (192, 10)"`."""
    paths, _ = leaf_paths(tree)
    return {path: f"{np.dtype(leaf.dtype)} {tuple(leaf.shape)}" for path, leaf in paths}
