"""The package's calls by name: models, their weights from anywhere, how their images are prepared."""

import dataclasses
import fnmatch
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from cait_jax.data.image_files import nearest_path
from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import Literal, UserError, Way, advise, in_python, nearest, setting
from cait_jax.models import zoo
from cait_jax.models.variants import VARIANTS
from cait_jax.weights.adapt import adapt_head, adapt_input
from cait_jax.weights.hub import RELEASED, download, find_released
from cait_jax.weights.hub_files import Place, as_written, local
from cait_jax.weights.model_json import replace_attributes
from cait_jax.weights.runs import (
    backbone_of,
    is_run,
    read_run,
    run_model,
    run_objective,
    run_settings,
)
from cait_jax.weights.saved import is_saved, read_saved, read_saved_weights, save_pretrained
from cait_jax.weights.state_dicts import SUFFIXES, check_finite, read_weights
from cait_jax.weights.timm_names import from_timm

_log = logging.getLogger(__name__)

__all__ = [
    "Settings",
    "create_model",
    "list_models",
    "load_pretrained",
    "load_settings",
    "preprocessing",
    "save_pretrained",
]


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is saved beside a model's weights; None where it is not.

    Attributes:
      label_names: the classes in the order of the logits; None for released weights, which have ImageNet-1k's.
      preprocessing: `image_size` [height, width] in pixels, `crop_pct`, `mean` and `std` of each channel
        on a scale from 0 to 1, and `channels`.
    """

    label_names: tuple[str, ...] | None
    preprocessing: dict[str, Any] | None


def list_models(pattern: str = "*", *, pretrained: bool = False) -> list[str]:
    """The names that match a shell pattern such as `"cait_s*"`, in alphabetical order.

    With `pretrained`, only those with released weights.
    """
    return sorted(fnmatch.filter(RELEASED if pretrained else VARIANTS, pattern))


def create_model(name: str, *, pretrained: bool = False, **attributes: Any) -> Any:
    """Makes a model by name: an architecture, without parameters.

    Args:
      name: one of `list_models()`.
      pretrained: with its released weights, downloaded on first use.
      **attributes: what differs from the name's own; None: nothing. With `pretrained`, see `load_pretrained`. Else
        `image_size`, a side in pixels or (height, width); `num_classes`, 1000 by default, 0 for features; `dtype`
        of the computation and `param_dtype`, float32 by default, such as `jnp.bfloat16` or `"bfloat16"`;
        `precision` of matmuls, such as `"highest"`; any other of the network, such as `in_channels=1`.

    Returns:
      A Flax Linen module: `variables = model.init(key, images)`, `logits = model.apply(variables, images)`.
      With `pretrained` the model and its variables.

    Raises:
      UserError: a name or attribute is unknown, sizes do not match each other, or the weights do not exist or
        cannot be downloaded.
    """
    if pretrained:
        return load_pretrained(name, **attributes)
    return zoo.create_model(name, **attributes)


def load_pretrained(
    name_or_path: Place,
    *,
    weights: Place | None = None,
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
    """Makes a model and loads its weights, strictly: all of them, or an error.

    Args:
      name_or_path: a model's name; or a directory that `save_pretrained` or `export_timm` wrote, or that
        of a training run (its newest checkpoint) or of one of its checkpoints (`RUN/checkpoints/STEP`); or
        `hf://NAMESPACE/NAME[@COMMIT]`, a saved model on the Hugging Face hub.
      weights: other weights: a `.safetensors`, `.pth`, `.pt` or `.bin` file with timm's names, or such a
        directory or address.
      image_size: side in pixels, or (height, width), to which the position embedding is resized.
      patch_size: in pixels; the patch kernel is resized to it.
      num_classes: 0 leaves out the head.
      reset_head: initialise the head, as another number of classes needs.
      antialias: resize positions as timm does; by default as the released weights were.
      dtype: of the computation; by default float32 for a name, or the saved model's own.
      param_dtype: by default as `dtype`. One that cannot hold the numbers of the file exactly must be given.
      ema: of a training run, or of a file that holds both, the average of the parameters.
      seed: of the head's initialisation.
      weights_image_size: (height, width) that a file's weights were made for, where it is not square.
      **overrides: any other attribute of the model, such as `drop_path_rate=0.1`; None leaves it as it is.

    Returns:
      The model, and its variables: `logits = model.apply(variables, images)`.

    Raises:
      UserError: weights are missing, broken, or do not match the model.
    """
    attributes = overrides | {
        "image_size": image_size,
        "patch_size": patch_size,
        "num_classes": num_classes,
        "dtype": dtype,
        "param_dtype": param_dtype,
    }
    attributes = {key: value for key, value in attributes.items() if value is not None}

    place: Place
    if _is_name(name_or_path):
        name = str(name_or_path)
        if weights is None:
            find_released(name)
        model = zoo.create_model(name, **attributes)
        place = download(find_released(name)) if weights is None else weights
        trained, stored = _read(place, ema)
    else:
        place = name_or_path
        trained, stored = _read(place, ema and weights is None)
        if trained is None:
            raise _no_network(place)
        model = replace_attributes(trained, **attributes)
        if weights is not None:
            place = weights
            trained, stored = _read(place, ema)
    size = weights_image_size or getattr(trained, "image_size", None)
    try:
        stored = adapt_input(stored, model, image_size=size, antialias=antialias)
        stored, _ = adapt_head(stored, model, reset=reset_head, seed=seed)
        if param_dtype is None:
            _check_exact(stored, model.param_dtype)
        else:
            check_finite(stored, model.param_dtype)
        return model, from_timm(stored, model)
    except UserError as error:
        raise UserError(f"{as_written(place)}: {error}") from error


def load_model(name_or_path: Place) -> Any:
    """The model of `load_pretrained(name_or_path)`, from what is saved beside the weights, which are not read.

    Raises:
      UserError: there is no such name or directory, it cannot be read, or it holds weights alone.
    """
    if _is_name(name_or_path):
        return zoo.create_model(str(name_or_path))
    path = local(name_or_path, weights=False)
    if is_run(path):
        return run_model(path)
    if is_saved(path):
        return read_saved(path).model
    raise _no_network(path) if _is_file_of_weights(path) else _no_source(path)


def load_settings(name_or_path: Place) -> Settings:
    """The class names and preprocessing saved beside the model of `load_pretrained(name_or_path)`.

    Raises:
      UserError: there is no such name or directory, or it cannot be read.
    """
    if _is_name(name_or_path):
        return Settings(None, find_released(str(name_or_path)).preprocessing())
    path = local(name_or_path, weights=False)
    if is_run(path):
        return Settings(*run_settings(path))
    if not is_saved(path):
        raise _no_source(path)
    saved = read_saved(path)
    return Settings(saved.label_names, saved.preprocessing)


def preprocessing(
    name_or_path: Place, *, image_size: int | tuple[int, int] | None = None
) -> Preprocessing:
    """The preprocessing of a model's evaluation, a function of PIL images or paths.

    A named model without released weights gets ImageNet's mean and standard deviation.

    Args:
      name_or_path: as `load_pretrained` takes it.
      image_size: side in pixels, or (height, width), instead of the model's own.

    Returns:
      `preprocessing(name)(images)` is float32 (batch, height, width, channels).

    Raises:
      UserError: there is no such name or directory, or no preprocessing is saved in it.
    """
    prepare = _preprocessing(name_or_path)
    if image_size is None:
        return prepare
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    return dataclasses.replace(prepare, image_size=size)


def _preprocessing(name_or_path: Place) -> Preprocessing:
    name = str(name_or_path)
    if name in VARIANTS and name not in RELEASED:
        model = zoo.create_model(name)
        if model.in_channels == 3:
            return Preprocessing(model.image_size)
    else:
        settings = load_settings(name_or_path).preprocessing
        if settings is not None:
            return Preprocessing.from_dict(settings)
    if in_python():
        fix = "make a cait_jax.Preprocessing of its image_size, crop_pct, mean, std and channels"
    else:
        fix = advise(
            Way("give {}, a directory saved with its preprocessing", "weights", Literal("DIR")),
            otherwise="choose a model saved with its preprocessing",
        )
    raise UserError(f"no preprocessing is known for {name}: {fix}")


def _is_name(name_or_path: Place) -> bool:
    """Whether it is a model's name and not a path; what is neither is refused as the likelier of the two.

    Raises:
      UserError: it looks like a name and is none, with the nearest names and models in the working directory.
    """
    if not isinstance(name_or_path, str):
        return False
    if name_or_path in VARIANTS or name_or_path in RELEASED:
        return True
    path = Path(name_or_path)
    if path.exists() or path.name != name_or_path or path.suffix:
        return False
    beside = [each.name for each in Path().iterdir() if is_run(each) or is_saved(each)]
    known = {*VARIANTS, *RELEASED, *beside}
    raise UserError(f"there is no model {name_or_path!r}; {nearest(name_or_path, known)}")


def _read(place: Place, ema: bool) -> tuple[Any, dict[str, np.ndarray]]:
    """The model, None for a file, and the weights as a state dict of timm's."""
    path = local(place)
    if is_run(path):
        trained, weights = read_run(path, ema=ema)
    elif is_saved(path):
        if ema:
            raise UserError(
                f"{as_written(place)} is a saved model, which has no average beside its weights: leave out "
                f"{setting('ema', True)}"
            )
        trained, weights = read_saved(path).model, read_saved_weights(path)
    elif _is_file_of_weights(path):
        trained, weights = None, read_weights(path, ema=ema)
    else:
        raise _no_source(path)
    try:
        check_finite(weights)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return trained, weights


def _is_file_of_weights(path: Path) -> bool:
    return path.suffix in SUFFIXES and not path.is_dir()


def _no_network(path: Place) -> UserError:
    return UserError(
        f"{path} holds weights but not the network they are of: give "
        f"{setting('name_or_path', Literal('NAME'))} and {setting('weights', str(path))}"
    )


def _no_source(path: Path) -> UserError:
    what = "is not" if path.exists() else "does not exist, so it is not"
    return UserError(
        f"{path} {what} a file of weights ({', '.join(SUFFIXES)}), the directory of a saved model "
        "(with a config.json) or of a training run (with checkpoints/), or hf://NAMESPACE/NAME: give one of these"
        + ("" if path.exists() else nearest_path(path))
    )


def _check_exact(weights: Mapping[str, np.ndarray], param_dtype: Any) -> None:
    wide = {
        array.dtype
        for name, array in weights.items()
        # Statistics of batch norms are float32 whatever `param_dtype` is.
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


def params_from_config(config: ConfigDict, model: Any) -> Any:
    """The `params` tree that a config's `init` names, on the host; None where it names none.

    Args:
      config: `init.weights` is a file, a saved directory or a workdir, of MAE with its encoder alone
        (`encoder.params_from_encoder`); `init.pretrained` stands for the released weights of `model.name`; with
        `init.reset_head`, or weights of DINO, the head is initialised from the seed.
      model: the run's; position embedding and patch kernel are resized to it.

    Raises:
      UserError: the weights cannot be had or do not fit, or both keys are given.
    """
    init = config.init
    if init.weights is None and not init.pretrained:
        if init.reset_head or init.ema:
            raise UserError(
                f"{setting('config.init.reset_head')} and {setting('config.init.ema')} go with "
                f"{setting('config.init.weights', Literal('PATH'))} or "
                f"{setting('config.init.pretrained', True)}: give one of these, or leave them out"
            )
        return None
    if init.weights is not None and init.pretrained:
        raise UserError(
            f"{setting('config.init.weights')} and {setting('config.init.pretrained')} both say where to "
            "start: give one"
        )
    path = None if init.weights is None else Path(init.weights)
    objective = run_objective(path) if path is not None and is_run(path) else "supervised"
    if path is not None and objective == "mae":
        from cait_jax.weights.encoder import params_from_encoder

        return params_from_encoder(path, model, ema=init.ema, seed=config.seed)
    reset_head = init.reset_head
    backbone = backbone_of(objective)
    if backbone is not None and model.num_classes:  # there is no head that could be kept
        reset_head = True
        _log.warning(
            "%s was trained without labels: %s is taken, %s is dropped, and the head starts anew",
            path, backbone.name, backbone.dropped,
        )  # fmt: skip
    loaded, variables = load_pretrained(
        config.model.name,
        weights=init.weights,
        image_size=model.image_size,
        num_classes=model.num_classes,
        in_channels=model.in_channels,
        reset_head=reset_head,
        ema=init.ema,
        seed=config.seed,
        **{key: value for key, value in config.model.items() if key != "name"},
    )
    assert loaded == model
    return variables["params"]
