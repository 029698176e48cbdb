"""The package's calls by name: a model with or without weights, which there are, how its images are prepared."""

import dataclasses
import fnmatch
import os
from typing import Any

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError
from cait_jax.interface import Literal, Way, advise, in_python
from cait_jax.models import zoo
from cait_jax.weights.pretrained import load_pretrained, load_settings
from cait_jax.weights.released import RELEASED


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """Names the models whose name matches a shell pattern, in alphabetical order.

    Args:
      pattern: such as `"cait_s*"`.
      pretrained: only those with released weights.

    Returns:
      The names, which may be none.
    """
    if pretrained:
        return sorted(fnmatch.filter(RELEASED, pattern))
    return zoo.list_models(pattern)


def create_model(name: str, *, pretrained: bool = False, **attributes: Any) -> Any:
    """Makes a model by name.

    Args:
      name: a name of `list_models()`.
      pretrained: with its released weights, downloaded on first use.
      **attributes: see `cait_jax.models.zoo.create_model`; with `pretrained`, see `load_pretrained`.

    Returns:
      A Flax Linen module: `variables = model.init(key, images)`, `logits = model.apply(variables, images)`.
      With `pretrained` the model and its variables.

    Raises:
      UserError: for an unknown name or attribute, for sizes that do not fit, and for weights that do not
        exist or cannot be had.
    """
    if pretrained:
        return load_pretrained(name, **attributes)
    return zoo.create_model(name, **attributes)


def preprocessing(
    name_or_path: str | os.PathLike[str], *, image_size: int | tuple[int, int] | None = None
) -> Preprocessing:
    """The function from images to a batch that a model was evaluated with.

    Args:
      name_or_path: a model's name, or a directory as `load_pretrained` takes it.
      image_size: side in pixels, or (height, width), if it is to be another than the model's own.

    Returns:
      `preprocessing(name)(images)`: PIL images or paths to float32 (batch, height, width, channels). A named
      model without released weights gets its own resolution and ImageNet's mean and standard deviation.

    Raises:
      UserError: there is no such name or directory, or it does not say how its images are prepared.
    """
    prepare = _preprocessing(name_or_path)
    if image_size is None:
        return prepare
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return dataclasses.replace(prepare, image_size=size)


def _preprocessing(name_or_path: str | os.PathLike[str]) -> Preprocessing:
    name = str(name_or_path)
    if name in zoo.VARIANTS and name not in RELEASED:
        model = zoo.create_model(name)
        if model.in_channels == 3:
            return Preprocessing(model.image_size)
    else:
        settings = load_settings(name_or_path).preprocessing
        if settings is not None:
            return Preprocessing.from_dict(settings)
    if in_python():
        fix = "make a cait_jax.Preprocessing of its image_size, crop_ratio, mean, std and channels"
    else:
        fix = advise(
            Way("give {}, a directory saved with its preprocessing", "weights", Literal("DIR")),
            otherwise="choose a model saved with its preprocessing",
        )
    raise UserError(f"nothing says how images for {name} are prepared: {fix}")
