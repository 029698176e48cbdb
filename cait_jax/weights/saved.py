"""Saved models: directories with weights under timm's names, and model and settings in `config.json`."""

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import Literal, UserError, one_line, setting
from cait_jax.files import sha256
from cait_jax.models.inspect import abstract_variables
from cait_jax.reading import check_format, read_json
from cait_jax.renamed import current_preprocessing
from cait_jax.sharding import leaf_shapes
from cait_jax.weights.model_json import model_from_dict, model_to_dict
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
