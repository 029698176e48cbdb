"""A model as what JSON can hold, and a model from that."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from cait_jax.errors import UserError, nearest
from cait_jax.models.cait import CaiT
from cait_jax.models.regnet import RegNetY
from cait_jax.models.zoo import VisionTransformer, float_dtype, misfit
from cait_jax.sharding import leaf_shapes
from cait_jax.weights.finite import check_finite
from cait_jax.weights.published import to_published, variables_template

# The networks that can be saved, under the names their files say.
FAMILIES: Mapping[str, type[nn.Module]] = {
    network.__name__: network for network in (CaiT, VisionTransformer, RegNetY)
}
_DTYPES = ("dtype", "param_dtype")


def describe(model: Any) -> dict[str, Any]:
    """Every attribute that defines a model.

    Args:
      model: a model of `FAMILIES`.

    Returns:
      `{"family": name, "attributes": {name: value}}`, dtypes by their names; `build` undoes it.

    Raises:
      UserError: the model is of another class, or has an attribute that JSON cannot hold.
    """
    family = type(model).__name__
    if FAMILIES.get(family) is not type(model):
        raise UserError(
            f"a {family} cannot be saved; it can be one of {', '.join(sorted(FAMILIES))}"
        )
    attributes = {}
    for name in attribute_names(model):
        value = getattr(model, name)
        if name in _DTYPES:
            value = jnp.dtype(value).name
        elif isinstance(value, jax.lax.Precision):
            value = value.name.lower()
        elif isinstance(value, tuple):
            value = list(value)
        parts = value if isinstance(value, list) else [value]
        if not all(part is None or isinstance(part, str | int | float) for part in parts):
            raise UserError(
                f"{name}={value!r} cannot be saved: give the model a number or a string there"
            )
        attributes[name] = value
    return {"family": family, "attributes": attributes}


def build(description: Mapping[str, Any]) -> Any:
    """The model that `describe` described.

    Raises:
      UserError: the family or an attribute is unknown, or a value does not fit.
    """
    family = description["family"]
    if family not in FAMILIES:
        raise UserError(
            f"there is no network {family!r} in this version; {nearest(family, FAMILIES)}"
        )
    attributes = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in description["attributes"].items()
    }
    for name in _DTYPES:
        if name in attributes:
            attributes[name] = float_dtype(name, attributes[name])
    known = {field.name for field in dataclasses.fields(FAMILIES[family])}
    _refuse_unknown(family, attributes, known)
    try:
        return FAMILIES[family](**attributes)
    except (TypeError, ValueError) as error:
        raise misfit(family, error) from error


def change(model: Any, **attributes: Any) -> Any:
    """The model with some attributes replaced.

    Args:
      model: a model.
      **attributes: new values; `image_size` may be one side, a dtype may be its name.

    Raises:
      UserError: an attribute is unknown, or its value does not fit.
    """
    _refuse_unknown(type(model).__name__, attributes, set(attribute_names(model)))
    size = attributes.get("image_size")
    if size is not None:
        attributes["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    for name in _DTYPES:
        if name in attributes:
            attributes[name] = float_dtype(name, attributes[name])
    try:
        return model.clone(**attributes)
    except (TypeError, ValueError) as error:
        raise misfit(type(model).__name__, error) from error


def attribute_names(model: Any) -> list[str]:
    """The attributes of a model, without those that Flax adds."""
    return [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]


def checked_weights(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A model's variables under their published names.

    Args:
      model: the model.
      variables: its variables; collections that initialisation does not make are left out.

    Returns:
      Published name to array, in PyTorch's layout, dtypes unchanged.

    Raises:
      UserError: a variable is missing, left over, of another shape or dtype than the model's, or not finite.
    """
    expected = variables_template(model)
    given = {name: variables[name] for name in expected if name in variables}
    found, wanted = leaf_shapes(given), leaf_shapes(expected)
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"these variables are not this model's: {name} is {found.get(name, 'missing')} and "
                f"should be {wanted.get(name, 'absent')}: use a model made for them, with their param_dtype"
            )
    weights = to_published(given)
    check_finite(weights)
    return weights


def _refuse_unknown(family: str, attributes: Mapping[str, Any], known: set[str]) -> None:
    for name in attributes:
        if name not in known:
            raise UserError(f"{family} has no attribute {name!r}; {nearest(name, known)}")
