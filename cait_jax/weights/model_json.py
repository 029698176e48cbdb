"""A network as JSON and back: its family and attributes, as `config.json` of a saved model holds them."""

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.errors import UserError, nearest
from cait_jax.models.zoo import FAMILIES, float_dtype, misfit, network_class
from cait_jax.renamed import current_attributes

_DTYPES = ("dtype", "param_dtype")
# Bounds of the numbers among a network's attributes.
_MOST, _MOST_BLOCKS = 2**24, 1024
_SIZES = ("image_size", "width", "depth", "num_heads", "patch_size", "in_channels")


def model_to_dict(model: Any) -> dict[str, Any]:
    """A model of `FAMILIES` as `{"family": name, "attributes": {name: value}}`, dtypes by their names.

    Raises:
      UserError: the model is of another class, or has an attribute that JSON cannot hold.
    """
    family = type(model).__name__
    if family not in FAMILIES or network_class(family) is not type(model):
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


def model_from_dict(description: Mapping[str, Any]) -> Any:
    """The inverse of `model_to_dict`.

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
        for name, value in current_attributes(description["attributes"]).items()
    }
    _check_attributes(family, attributes)
    attributes = _converted(family, attributes, attribute_names(network_class(family)))
    try:
        return network_class(family)(**attributes)
    except (TypeError, ValueError) as error:
        raise misfit(family, error) from error


def replace_attributes(model: Any, **attributes: Any) -> Any:
    """The model with some attributes replaced; `image_size` may be one side, a dtype may be its name.

    Raises:
      UserError: an attribute is unknown, or its value does not fit.
    """
    attributes = _converted(type(model).__name__, attributes, attribute_names(model))
    if (size := attributes.get("image_size")) is not None:
        attributes["image_size"] = (size, size) if isinstance(size, int) else tuple(size)
    try:
        return model.clone(**attributes)
    except (TypeError, ValueError) as error:
        raise misfit(type(model).__name__, error) from error


def attribute_names(model: Any) -> list[str]:
    """The attributes of a model, without those that Flax adds."""
    return [f.name for f in dataclasses.fields(model) if f.name not in ("parent", "name")]


def _converted(family: str, attributes: Mapping[str, Any], known: list[str]) -> dict[str, Any]:
    """The attributes with dtypes in place of their names."""
    for name in attributes:
        if name not in known:
            raise UserError(f"{family} has no attribute {name!r}; {nearest(name, known)}")
    return {
        name: float_dtype(name, value) if name in _DTYPES else value
        for name, value in attributes.items()
    }


def _check_attributes(family: str, attributes: Mapping[str, Any]) -> None:
    """Refuses attributes in `config.json` of another type than the network's, and numbers beyond reason."""
    hints = typing.get_type_hints(network_class(family))
    for name, value in attributes.items():
        if name not in hints:
            continue  # it is refused with the nearest name
        most = _MOST_BLOCKS if name.endswith("depth") else _MOST
        least = 1 if name in _SIZES else -_MOST if name == "layer_scale_init" else 0
        known = {"precision": (None, "default", "high", "highest")}.get(name)
        right = value in known if known and isinstance(value, str | None) else known is None
        if name in _DTYPES:
            right = isinstance(value, str)
        if not right or not _is_of(hints[name], value, (least, most)):
            raise UserError(f"{family}: {name} cannot be {repr(value)[:80]}: save the model again")


def _is_of(hint: Any, value: Any, within: tuple[int, int]) -> bool:
    """Whether a value of JSON is of a type, and if a number, within two bounds."""
    if hint is Any:
        return value is None or isinstance(value, str)
    parts = typing.get_args(hint)
    if typing.get_origin(hint) is tuple:
        several = (
            parts[:1] * len(value) if parts[1:] == (...,) and isinstance(value, tuple) else parts
        )
        return (
            isinstance(value, tuple)
            and len(value) == len(several)
            and all(map(_is_of, several, value, [within] * len(value)))
        )
    if parts:
        return any(_is_of(part, value, within) for part in parts)
    if hint in (int, float):
        kinds = int if hint is int else int | float
        return (
            isinstance(value, kinds)
            and not isinstance(value, bool)
            and within[0] <= value <= within[1]
        )
    return isinstance(value, hint)
