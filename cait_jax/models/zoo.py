"""Models by name."""

import dataclasses
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from cait_jax.errors import UserError, Way, advise, can_set, nearest, setting
from cait_jax.kernels import DEFAULT_ATTENTION
from cait_jax.models.cait import CaiT
from cait_jax.models.variants import VARIANTS
from cait_jax.models.vit import VisionTransformer
from cait_jax.renamed import KEY_OF
from cait_jax.sharding import device_memory

if TYPE_CHECKING:
    from cait_jax.models.regnet import RegNetY

    Network = CaiT | RegNetY
else:
    Network = nn.Module

FAMILIES = ("CaiT", "VisionTransformer", "RegNetY")
FLOAT_DTYPES = ("bfloat16", "float32", "float64")


def network_class(family: str) -> Any:
    """The class of one of `FAMILIES`."""
    if family == "RegNetY":
        from cait_jax.models.regnet import RegNetY

        return RegNetY
    return {"CaiT": CaiT, "VisionTransformer": VisionTransformer}[family]


def create_model(name: str, **attributes: Any) -> Network:
    """Makes a model by name, see `cait_jax.create_model`."""
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, VARIANTS)}")
    variant = VARIANTS[name]
    network = network_class(variant.family)
    known = {field.name for field in dataclasses.fields(network)} - {"parent", "name"}
    given = {key: value for key, value in attributes.items() if value is not None}
    for key in given:
        if key not in known:
            raise UserError(f"{name} has no attribute {key!r}; {nearest(key, known)}")
    values = {"dtype": "float32", "param_dtype": "float32", **variant.attributes, **given}
    size = values["image_size"]
    try:
        values["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
        for key in ("dtype", "param_dtype"):
            values[key] = float_dtype(key, values[key])
        model: Network = network(**values)
    except (TypeError, ValueError) as error:
        raise misfit(name, error) from error
    return model


def misfit(name: str, error: Exception) -> UserError:
    """A model's `error`, whose message begins with an attribute, in the words of the interface."""
    attribute, space, rest = str(error).partition(" ")
    named = setting(attribute) if attribute in KEY_OF and can_set(attribute) else attribute
    return UserError(f"{name}: {named}{space}{rest}")


def float_dtype(argument: str, dtype: Any) -> Any:
    """A floating-point dtype of networks from itself or its name; UserError that names the argument otherwise."""
    known = {name: jnp.dtype(name) for name in FLOAT_DTYPES}
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in known:
        raise UserError(f"there is no {argument} {name!r}; {nearest(name, known)}")
    return known[name]


def check_attention_memory(model: Network) -> None:
    """Refuses a network if the attention maps of one block and one image do not fit in a device's memory.

    Kernels that keep maps in tiles are not refused, nor devices whose memory is not known.

    Raises:
      UserError: with the numbers.
    """
    if not isinstance(model, CaiT):
        return
    chosen = model.attention or DEFAULT_ATTENTION.get(jax.default_backend(), "xla")
    patches = math.prod(side // model.patch_size for side in model.image_size)
    needed = model.num_heads * patches**2 * jnp.dtype(model.dtype).itemsize
    available = device_memory(jax.local_devices())
    if not chosen.startswith("xla") or available is None or needed <= available:
        return
    height, width = model.image_size
    raise UserError(
        f"attention between the {patches:,} patches of an image of {height} by {width} pixels takes "
        f"{needed / 1e9:,.1f} GB, and a device has {available / 1e9:,.1f} GB: "
        + advise(
            Way("lower {}", "image_size"),
            Way("raise {}", "patch_size"),
            otherwise="choose smaller images",
        )
    )
