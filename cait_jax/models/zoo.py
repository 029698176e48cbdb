"""Models by name."""

import dataclasses
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from flax import linen as nn

from cait_jax.errors import KEY_OF, UserError, can_set, nearest, setting
from cait_jax.models.cait import CaiT
from cait_jax.models.variants import VARIANTS, VisionTransformer

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


def create_model(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int = 1000,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    precision: Any = None,
    **overrides: Any,
) -> Network:
    """Makes a model by name: an architecture, without parameters.

    Args:
      name: a name of `cait_jax.list_models()`.
      image_size: side in pixels, or (height, width); the name's own resolution if not given.
      num_classes: classes of the head; 0 gives features.
      dtype: of the computation, such as `jnp.bfloat16` or `"bfloat16"`.
      param_dtype: of the parameters.
      precision: of matmuls, such as `"highest"`.
      **overrides: any other attribute of the network, such as `in_channels=1`, `drop_path_rate=0.1` or `depth=12`;
        None means the name's own.

    Returns:
      A Flax Linen module: `variables = model.init(key, images)`, `logits = model.apply(variables, images)`.

    Raises:
      UserError: for an unknown name or attribute, and for sizes or head counts that do not fit.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, VARIANTS)}")
    variant = VARIANTS[name]
    network = network_class(variant.family)
    known = {field.name for field in dataclasses.fields(network)} - {"parent", "name"}
    for key in overrides:
        if key not in known:
            raise UserError(f"{name} has no attribute {key!r}; {nearest(key, known)}")
    size = variant.attributes["image_size"] if image_size is None else image_size
    try:
        model: Network = network(
            **{**variant.attributes, **{k: v for k, v in overrides.items() if v is not None}}
            | {"image_size": (size, size) if isinstance(size, int) else tuple(size)},
            num_classes=num_classes,
            dtype=float_dtype("dtype", dtype),
            param_dtype=float_dtype("param_dtype", param_dtype),
            precision=precision,
        )
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
