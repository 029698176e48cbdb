"""The package's calls by name: models, their weights from anywhere, how their images are prepared."""

import dataclasses
import fnmatch
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import Literal, UserError, Way, advise, in_python, setting
from cait_jax.models import zoo
from cait_jax.models.zoo import VARIANTS
from cait_jax.weights.adapt import adapt_head, adapt_input
from cait_jax.weights.hub import RELEASED, download, find_released
from cait_jax.weights.runs import is_run, read_run, run_settings
from cait_jax.weights.saved import change, is_saved, read_saved, read_saved_weights, save_pretrained
from cait_jax.weights.state_dicts import SUFFIXES, check_finite, read_weights
from cait_jax.weights.timm_names import from_timm


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


__all__ = ["Settings", "load_pretrained", "load_settings", "save_pretrained"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What prediction needs beside a model.

    Attributes:
      label_names: names of the classes in the order of the logits; None where none are saved. Released
        weights have ImageNet-1k's.
      preprocessing: `image_size` [height, width] in pixels, `crop_ratio`, `mean` and `std` of each channel
        on a scale from 0 to 1, and `channels`; None where none is saved.
    """

    label_names: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    *,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    num_classes: int | None = None,
    reset_head: bool = False,
    antialias: bool = False,
    dtype: Any = None,
    param_dtype: Any = None,
    ema: bool = False,
    seed: int = 0,
    weights_image_size: tuple[int, int] | None = None,
    **overrides: Any,
) -> tuple[Any, dict[str, Any]]:
    """Makes a model and fills it with weights, strictly: all of them, or an error.

    Args:
      name_or_path: a name of a model; or a directory that `save_pretrained` or `export_timm` wrote, or that
        of a training run (its newest checkpoint) or of one of its checkpoints (`RUN/checkpoints/STEP`).
      weights: where the weights are instead: a `.safetensors`, `.pth`, `.pt` or `.bin` file under the
        published names, or such a directory.
      image_size: side in pixels, or (height, width); positions are resized to it.
      patch_size: side of a patch in pixels; the patch kernel is resized to it.
      num_classes: classes of the head; 0 leaves the head out.
      reset_head: start the head anew, as another number of classes needs.
      antialias: resize positions as timm does; by default as the released weights were.
      dtype: dtype of the computation; if not given float32 for a name, or the saved model's own.
      param_dtype: dtype of the parameters, likewise. One that cannot hold the numbers of the file exactly
        must be asked for.
      ema: of a training run, or of a file that holds both, the average of the parameters.
      seed: what a new head is drawn from.
      weights_image_size: (height, width) that a file's weights were made for, where it is not square.
      **overrides: any other attribute of the model, such as `drop_path_rate=0.1`; None leaves it as it is.

    Returns:
      The model, and its variables: `logits = model.apply(variables, images)`.

    Raises:
      UserError: in one sentence, for anything missing, broken, or not fitting.
    """
    attributes = overrides | {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    attributes = {key: value for key, value in attributes.items() if value is not None}

    if _is_name(name_or_path):
        name = str(name_or_path)
        if weights is None:
            find_released(name)
        model = zoo.create_model(name, **attributes)
        place = download(find_released(name)) if weights is None else Path(weights)
        trained, stored = _read(place, ema)
    else:
        place = Path(name_or_path)
        trained, stored = _read(place, ema and weights is None)
        if trained is None:
            raise UserError(
                f"{place} holds weights but not the network they are of: give "
                f"{setting('name_or_path', Literal('NAME'))} and {setting('weights', str(place))}"
            )
        model = change(trained, **attributes)
        if weights is not None:
            place = Path(weights)
            trained, stored = _read(place, ema)
    size = weights_image_size or getattr(trained, "image_size", None)
    try:
        stored = adapt_input(stored, model, image_size=size, antialias=antialias)
        stored, _ = adapt_head(stored, model, reset=reset_head, seed=seed)
        if param_dtype is None:
            _refuse_rounding(stored, model.param_dtype)
        else:
            check_finite(stored, model.param_dtype)
        return model, from_timm(stored, model)
    except UserError as error:
        raise UserError(f"{place}: {error}") from error


def load_settings(name_or_path: str | os.PathLike[str]) -> Settings:
    """What prediction needs beside the model of `load_pretrained(name_or_path)`.

    Args:
      name_or_path: a released name, or a directory as `load_pretrained` takes it.

    Raises:
      UserError: there is no such name or directory, or it cannot be read.
    """
    if _is_name(name_or_path):
        return Settings(None, find_released(str(name_or_path)).preprocessing())
    path = Path(name_or_path)
    if is_run(path):
        return Settings(*run_settings(path))
    if not is_saved(path):
        raise _no_source(path)
    saved = read_saved(path)
    return Settings(saved.label_names, saved.preprocessing)


def _is_name(name_or_path: str | os.PathLike[str]) -> bool:
    """Whether a model is meant and not a path: what is neither is refused as the likelier of the two."""
    if not isinstance(name_or_path, str):
        return False
    if name_or_path in VARIANTS or name_or_path in RELEASED:
        return True
    path = Path(name_or_path)
    return not path.exists() and path.name == name_or_path and not path.suffix


def _read(path: Path, ema: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """The model, where `path` says what it is, and the weights under their published names."""
    if is_run(path):
        trained, weights = read_run(path, ema=ema)
    elif is_saved(path):
        if ema:
            raise UserError(
                f"{path} is a saved model, which has no average beside its weights: leave out "
                f"{setting('ema', True)}"
            )
        trained, weights = read_saved(path).model, read_saved_weights(path)
    elif path.suffix in SUFFIXES and not path.is_dir():
        trained, weights = None, read_weights(path, ema=ema)
    else:
        raise _no_source(path)
    try:
        check_finite(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return trained, weights


def _no_source(path: Path) -> UserError:
    what = "is not" if path.exists() else "does not exist, so it is not"
    return UserError(
        f"{path} {what} a file of weights ({', '.join(SUFFIXES)}), the directory of a saved model "
        "(with a config.json) or of a training run (with checkpoints/): give one of these"
    )


def _refuse_rounding(weights: Mapping[str, np.ndarray], param_dtype: Any) -> None:
    wide = {
        array.dtype
        for name, array in weights.items()
        # Which are kept in float32 whatever the parameters are in.
        if not name.endswith(("running_mean", "running_var"))
        and jnp.issubdtype(array.dtype, jnp.floating)
        and jnp.promote_types(array.dtype, param_dtype) != param_dtype
    }
    if wide:
        found, wanted = min(str(dtype) for dtype in wide), jnp.dtype(param_dtype).name
        raise UserError(
            f"these weights are {found}, which {wanted} would round: "
            + advise(
                Way("give {} if that is meant", "param_dtype", wanted),
                otherwise=f"store them as {wanted}",
            )
        )
