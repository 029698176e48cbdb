"""Parameter names and layouts of timm and facebookresearch/deit to our variables and back.

Both directions walk the leaves of the pytree: each leaf has exactly one name there, or one a block where
blocks are stacked, so no weight can be used twice or left out unnoticed. What timm does not have (the
scalars of ReZero, say) is named by its path, so that every model of this package can be stored so.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.errors import UserError, Way, advise, some
from cait_jax.models.inspect import abstract_variables
from cait_jax.models.zoo import Network

_NUMBERED = re.compile(r"(blocks|blocks_token_only)_(\d+)")
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
# PyTorch's batch norms count their batches too; no result depends on it.
_COUNTER = "num_batches_tracked"


def from_timm(weights: Mapping[str, Any], model: Network) -> dict[str, Any]:
    """A model's variables from a state dict of timm's.

    Args:
      weights: name to array in PyTorch's layout, such as `blocks.0.attn.qkv.weight` (3d, d).
      model: blocks stacked or not.

    Returns:
      `params` in the model's `param_dtype` and, of RegNetY, `batch_stats` in float32.

    Raises:
      UserError: naming every weight that is missing, left over, or of another shape, or one that is not
        floating point.
    """
    template = abstract_variables(model)
    class_attention = _has_class_attention(template)
    unused = {name for name in weights if not name.endswith(_COUNTER)}
    missing: list[str] = []
    misshapen: list[str] = []

    def fill(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> Any:
        keys = tuple(key.key for key in path[1:])
        blocks = leaf.shape[0] if keys[0] == "blocks" else None
        names = list(_timm_names(keys, blocks, class_attention))
        shape = leaf.shape if blocks is None else leaf.shape[1:]
        arrays = []
        for name in names:
            if name not in weights:
                missing.append(name)
                continue
            unused.remove(name)
            array = _from_torch_layout(keys, np.asarray(weights[name]))
            if array.shape != shape:
                wanted = _to_torch_layout(keys, np.empty(shape, np.bool_)).shape
                misshapen.append(f"{name} is {np.shape(weights[name])}, not {wanted}")
            arrays.append(array)
        if missing or misshapen:
            return leaf
        whole = arrays[0] if blocks is None else np.stack(arrays)
        return jnp.asarray(whole, leaf.dtype)

    variables: dict[str, Any] = jax.tree_util.tree_map_with_path(fill, template)
    for name in sorted(weights.keys() - unused):
        dtype = np.asarray(weights[name]).dtype
        if not jnp.issubdtype(dtype, jnp.floating) and not name.endswith(_COUNTER):
            raise UserError(
                f"{name} is {dtype}, as in quantised weights: choose weights in floating point"
            )
    faults = [
        f"{len(names)} {what} ({some(names)})"
        for what, names in (
            ("missing", missing),
            ("left over", sorted(unused)),
            ("of another shape", misshapen),
        )
        if names
    ]
    if faults:
        other = advise(Way("name theirs by {}", "name_or_path"), otherwise="name theirs")
        raise UserError(
            f"these weights are not for this model: {'; '.join(faults)}: choose weights of this network, "
            f"or {other}"
        )
    return variables


def to_timm(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A model's variables as a state dict of timm's, in PyTorch's layout, dtypes unchanged.

    `from_timm` is its inverse, to the bit.
    """
    weights: dict[str, np.ndarray] = {}
    class_attention = _has_class_attention(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(dict(variables)):
        keys = tuple(key.key for key in path[1:])
        array = np.asarray(leaf)
        blocks = array.shape[0] if keys[0] == "blocks" else None
        parts = [array] if blocks is None else list(array)
        names = _timm_names(keys, blocks, class_attention)
        for name, part in zip(names, parts, strict=True):
            weights[name] = np.asarray(_to_torch_layout(keys, np.asarray(part)), order="C")
            if keys[-1] == "mean":
                counter = f"{name.removesuffix('running_mean')}{_COUNTER}"
                weights[counter] = np.zeros((), np.int64)
    return weights


def timm_names(model: Network) -> frozenset[str]:
    """The names of all of a model's variables in timm."""
    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), abstract_variables(model)
    )
    return frozenset(to_timm(empty))


def _has_class_attention(variables: Mapping[str, Any]) -> bool:
    return any(name.startswith("blocks_token_only") for name in variables["params"])


def _timm_names(keys: tuple[str, ...], blocks: int | None, class_attention: bool) -> Iterator[str]:
    """The names in timm of the leaf at `keys`: one, or one for each of the stacked `blocks`.

    LayerScale is `gamma_1` in a network with class attention, and `ls1.gamma` in one without.
    """
    first, rest = keys[0], keys[1:]
    if len(rest) >= 2 and rest[-2].startswith("layer_scale_"):
        number = rest[-2][-1]
        rest = (*rest[:-2], *([f"gamma_{number}"] if class_attention else [f"ls{number}", "gamma"]))
    elif rest:
        rest = (*rest[:-1], _LEAVES.get(rest[-1], rest[-1]))
    if blocks is not None:
        for i in range(blocks):
            yield ".".join((first, str(i), *rest))
    elif match := _NUMBERED.fullmatch(first):
        yield ".".join((*match.groups(), *rest))
    else:
        yield ".".join((first, *rest))


def _from_torch_layout(keys: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    """PyTorch's (out, in) and (out, in, height, width) to (in, out) and (height, width, in, out)."""
    if keys[-1] != "kernel":
        return array
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def _to_torch_layout(keys: tuple[str, ...], array: np.ndarray) -> np.ndarray:
    if keys[-1] != "kernel":
        return array
    return array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
