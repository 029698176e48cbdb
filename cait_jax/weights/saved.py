"""Directories with a model: those of `save_pretrained`, and of training runs, which are only read.

A saved model is weights under timm's names, and model and settings in `config.json`. `RUN` is a run's newest valid
checkpoint, `RUN/checkpoints/STEP` the one of that step and no other; a run is read also while it goes on.
"""

import dataclasses
import json
import os
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import Literal, UserError, nearest, one_line, setting
from cait_jax.files import sha256
from cait_jax.models.inspect import abstract_variables
from cait_jax.models.zoo import FAMILIES, create_model, float_dtype, misfit, network_class
from cait_jax.reading import check_format, read_json
from cait_jax.renamed import current_attributes, current_config, current_preprocessing
from cait_jax.sharding import leaf_shapes
from cait_jax.weights.state_dicts import (
    check_finite,
    read_weights,
    replace_files,
    safetensors_writer,
)
from cait_jax.weights.timm_names import to_timm

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
# Our section of config.json, beside those of other libraries.
SECTION = "cait_jax"
_FORMAT = 1
_DTYPES = ("dtype", "param_dtype")
# Bounds of the numbers among a network's attributes.
_MOST, _MOST_BLOCKS = 2**24, 1024
_SIZES = ("image_size", "width", "depth", "num_heads", "patch_size", "in_channels")
_CHECKPOINTS = "checkpoints"  # of a run


@dataclasses.dataclass(frozen=True)
class SavedModel:
    """A saved model but for its weights.

    Attributes:
      model: the module.
      label_names: the classes in the order of the logits, or None.
      preprocessing: `image_size`, `crop_pct`, `mean`, `std` and `channels`, or None.
      sha256: of the file of weights.
    """

    model: Any
    label_names: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None
    sha256: str


def save_pretrained(
    directory: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *,
    label_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> None:
    """Saves a model so that `load_pretrained(directory)` gives the same bits and the same outputs.

    Args:
      directory: made if missing; an earlier save in it is replaced.
      model: a model of this package.
      variables: in the model's `param_dtype`.
      label_names: the classes in the order of the logits.
      preprocessing: what `cait_jax.preprocessing` gives, a `Preprocessing` of your own, or its settings by name.

    Raises:
      UserError: variables, label names or preprocessing do not match the model, or the directory cannot be
        written; it is as it was then.
    """
    weights = checked_state_dict(model, variables)
    section = config_section(model, label_names=label_names, preprocessing=preprocessing)
    replace_files(
        Path(directory),
        {WEIGHTS: safetensors_writer(weights), CONFIG: config_writer({SECTION: section})},
    )


def config_section(
    model: Any, *, label_names: Sequence[str] | None, preprocessing: Any
) -> dict[str, Any]:
    """Our section of `config.json`, without the checksum of the weights.

    Raises:
      UserError: see `save_pretrained`.
    """
    if label_names is not None and len(label_names) != model.num_classes:
        raise UserError(
            f"there are {len(label_names)} label names and the model has {model.num_classes} classes: "
            "give one name a class"
        )
    return {
        "format": _FORMAT,
        **model_to_dict(model),
        "label_names": None if label_names is None else [str(name) for name in label_names],
        "preprocessing": None
        if preprocessing is None
        else _preprocessing_of(model, preprocessing).to_dict(),
    }


def config_writer(config: Mapping[str, Any]) -> Callable[[Path], None]:
    """A writer of `config.json` for `replace_files`, after that of the weights, whose SHA-256 it adds."""

    def write(path: Path) -> None:
        section = {**config[SECTION], "weights_sha256": sha256(path.with_name(WEIGHTS))}
        text = json.dumps({**config, SECTION: section}, indent=1, allow_nan=False)
        path.write_text(f"{text}\n", encoding="utf-8")

    return write


def is_saved(path: Path) -> bool:
    """Whether `path` is a directory with a `config.json`."""
    return (path / CONFIG).is_file()


def read_saved(directory: Path) -> SavedModel:
    """Reads `config.json`.

    Raises:
      UserError: it is not one of ours, or of a newer format.
    """
    file = directory / CONFIG
    try:
        config = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): save the model again") from error
    section = config.get(SECTION) if isinstance(config, dict) else None
    if not isinstance(section, dict):
        raise UserError(
            f"{file} is not of this package and does not say which network the weights are of: give "
            f"{setting('name_or_path', Literal('NAME'))} and {setting('weights', str(directory / WEIGHTS))}"
        )
    check_format(file, section.get("format"), _FORMAT)
    try:
        labels, settings = section["label_names"], section["preprocessing"]
        model = model_from_dict(section)
        _check_labels(file, labels, model.num_classes)
        return SavedModel(
            model=model,
            label_names=None if labels is None else tuple(labels),
            preprocessing=None if settings is None else current_preprocessing(settings),
            sha256=section["weights_sha256"],
        )
    except KeyError as error:
        raise UserError(f"{file} is incomplete (no {error}): save the model again") from error
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is damaged ({one_line(str(error))}): save the model again"
        ) from error


def _check_labels(file: Path, labels: Any, count: int) -> None:
    right = labels is None or (
        isinstance(labels, list)
        and len(labels) == count
        and all(isinstance(n, str) for n in labels)
    )
    if not right:
        raise UserError(
            f"{file} is damaged: its label_names are not one name for each of {count} classes; save the model "
            "again"
        )


def read_saved_weights(directory: Path) -> dict[str, np.ndarray]:
    """Reads the weights of a saved model.

    Raises:
      UserError: a file is missing, or the weights' SHA-256 is not that in `config.json`.
    """
    expected = read_saved(directory).sha256
    file = directory / WEIGHTS
    weights = read_weights(file)
    if sha256(file) != expected:
        raise UserError(
            f"{file} is not the file that {CONFIG} beside it was written for (its SHA-256 differs): "
            "save the model again"
        )
    return weights


def checked_state_dict(model: Any, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """`to_timm(variables)`, without collections that initialisation does not make.

    Raises:
      UserError: a variable is missing, left over, not finite, or of another shape or dtype than the model's.
    """
    expected = abstract_variables(model)
    given = {name: variables[name] for name in expected if name in variables}
    found, wanted = leaf_shapes(given), leaf_shapes(expected)
    for name in sorted({*found, *wanted}):
        if found.get(name) != wanted.get(name):
            raise UserError(
                f"these variables are not this model's: {name} is {found.get(name, 'missing')} and "
                f"should be {wanted.get(name, 'absent')}: use a model made for them, with their param_dtype"
            )
    weights = to_timm(given)
    check_finite(weights)
    return weights


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


def _preprocessing_of(model: Any, given: Any) -> Preprocessing:
    if not isinstance(given, Preprocessing | Mapping):
        raise UserError(
            f"preprocessing is of type {type(given).__name__}; give a cait_jax.Preprocessing, as "
            "cait_jax.preprocessing(NAME) returns, or a dict of its settings"
        )
    preprocessing: Preprocessing = (
        given if isinstance(given, Preprocessing) else Preprocessing.from_dict(given)
    )
    made = *preprocessing.image_size, preprocessing.channels
    taken = *model.image_size, model.in_channels
    if made != taken:
        raise UserError(
            f"preprocessing makes images of shape {made} and the model takes {taken}: give both the same "
            "image_size and channels"
        )
    return preprocessing


def is_run(path: Path) -> bool:
    """Whether `path` is the directory of a training run, or of one of its checkpoints."""
    return path.is_dir() and (_is_step(path) or (path / _CHECKPOINTS).is_dir())


def read_run(path: Path, *, ema: bool = False) -> tuple[Any, dict[str, np.ndarray]]:
    """Reads a run's parameters, or their average, without the optimiser's state.

    Returns:
      The model as it was trained, and a state dict of timm's.

    Raises:
      UserError: there is no checkpoint, none that is valid, or no average in it.
    """
    params, meta = _restore(path, "ema" if ema else "params")
    model = _model(meta, params)
    return model, checked_state_dict(model, {"params": params})


def run_model(path: Path) -> Any:
    """The model of a run; of its parameters none are read, but of an old run.

    Raises:
      UserError: there is no checkpoint, or none that is valid.
    """
    return _model(*_meta(path))


def run_settings(path: Path) -> tuple[tuple[str, ...], dict[str, Any]]:
    """A run's class names and the preprocessing of its evaluation.

    Raises:
      UserError: there is no checkpoint, or none that is valid.
    """
    meta, params = _meta(path)
    config = current_config(meta["config"])
    preprocessing = {
        "image_size": list(_image_size(config)),
        "crop_pct": config["eval"]["crop_pct"],
        "mean": list(config["data"]["mean"]),
        "std": list(config["data"]["std"]),
        "channels": _channels(meta, params),
    }
    return _class_names(meta, params), preprocessing


def _is_step(path: Path) -> bool:
    path = path.absolute()
    return path.name.isdecimal() and path.parent.name == _CHECKPOINTS


def _open(path: Path) -> tuple[Any, int | None]:
    """The checkpoints of a run, and the step of the one that `path` names; None: the newest valid one."""
    from cait_jax.checkpoint.store import Checkpoints

    if _is_step(path):
        return Checkpoints(path.absolute().parent), int(path.name)
    return Checkpoints(path / _CHECKPOINTS), None


def _meta(path: Path) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """The metadata of a run, and its parameters where they tell what old metadata do not, else nothing."""
    checkpoints, step = _open(path)
    meta = checkpoints.meta(step)
    if "class_names" in meta and "channels" in meta:
        return meta, {}
    params, meta = _restore(path, "params")
    return meta, params


def _restore(path: Path, part: str) -> tuple[dict[str, Any], dict[str, Any]]:
    checkpoints, step = _open(path)
    if part == "ema" and not checkpoints.meta(step)["config"]["optimizer"]["ema_decay"]:
        raise UserError(
            f"the run in {path} kept no average of its parameters (optimizer.ema_decay is 0): leave out "
            f"{setting('ema', True)}"
        )
    restored = checkpoints.restore_part(part, step=step)
    if restored is None:
        raise UserError(f"the run in {path} has saved no checkpoint yet: wait for its first")
    _, params, meta = restored
    return params, meta


def _model(meta: Mapping[str, Any], params: Mapping[str, Any]) -> Any:
    config = current_config(meta["config"])
    return create_model(
        image_size=_image_size(config),
        num_classes=len(_class_names(meta, params)),
        in_channels=_channels(meta, params),
        **config["model"],
    )


def _image_size(config: Mapping[str, Any]) -> tuple[int, int]:
    size = config["image_size"]
    return (size, size) if isinstance(size, int) else (size[0], size[1])


# Old runs, all of CaiT, saved neither class names nor channels.


def _class_names(meta: Mapping[str, Any], params: Mapping[str, Any]) -> tuple[str, ...]:
    if "class_names" in meta:
        return tuple(meta["class_names"])
    return tuple(str(i) for i in range(params["head"]["bias"].shape[0]))


def _channels(meta: Mapping[str, Any], params: Mapping[str, Any]) -> int:
    if "channels" in meta:
        return int(meta["channels"])
    return int(params["patch_embed"]["proj"]["kernel"].shape[2])
