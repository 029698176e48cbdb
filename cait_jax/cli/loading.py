"""The options by which every command names a model, and the model they name."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.numbers import SIDE


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model ready to use.

    Attributes:
      model: the network.
      variables: its variables.
      preprocessing: how its images are prepared.
      label_names: the names of its classes in the order of the logits, as a data set knows them; None if
        they are not known.
    """

    model: Any
    variables: Any
    preprocessing: Any
    label_names: tuple[str, ...] | None

    @property
    def class_words(self) -> list[str]:
        """What to call each class before people."""
        from cait_jax.data.imagenet import class_words

        if self.label_names is None:
            return [str(i) for i in range(self.model.num_classes)]
        return list(class_words(self.label_names))


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options that say which model; the command gets `load`, a function that loads it."""

    @click.option(
        "--model", "-m", required=True, metavar="NAME|DIR",
        help="A name of `cait models`, a saved model's directory, or a training run's.",
    )  # fmt: skip
    @click.option(
        "--weights", type=click.Path(path_type=Path), metavar="PATH",
        help="Weights instead of the released ones: a .safetensors or .pth file, or a directory.",
    )  # fmt: skip
    @click.option("--image-size", type=SIDE, metavar="PIXELS", help="Another resolution.")
    @click.option("--antialias", is_flag=True, help="Resize positions for it as timm does.")
    @click.option(
        "--ema",
        is_flag=True,
        help="Of a training run, or of a file that holds both, the averaged parameters.",
    )
    @functools.wraps(function)
    def with_load(
        model: str,
        weights: Path | None,
        image_size: int | None,
        antialias: bool,
        ema: bool,
        **others: Any,
    ) -> Any:
        def load(**attributes: Any) -> Loaded:
            return load_model(
                model,
                weights=weights,
                image_size=image_size,
                antialias=antialias,
                ema=ema,
                **attributes,
            )

        return function(load=load, model_name=model, **others)

    return with_load


def dtype_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--dtype`; the command gets `numerics`, the attributes of a model that computes so."""

    @click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
        help="Of the computation; float32 is exact on every device, bfloat16 fast.",
    )  # fmt: skip
    @functools.wraps(function)
    def with_numerics(dtype: str, **others: Any) -> Any:
        precision = "highest" if dtype == "float32" else None
        return function(numerics={"dtype": dtype, "precision": precision}, **others)

    return with_numerics


def load_model(
    name_or_path: str, *, weights: Path | None, image_size: int | None, **options: Any
) -> Loaded:
    """Loads a model with what prediction needs beside it.

    Args:
      name_or_path: as `cait_jax.load_pretrained` takes it.
      weights: likewise; of a directory, its settings count.
      image_size: another resolution, or None.
      **options: of `cait_jax.load_pretrained`.

    Raises:
      UserError: as from `load_pretrained` and `preprocessing`.
    """
    from cait_jax.data.imagenet import imagenet_classes
    from cait_jax.models.zoo import VARIANTS
    from cait_jax.weights.names import preprocessing
    from cait_jax.weights.pretrained import load_pretrained, load_settings

    model, variables = load_pretrained(
        name_or_path, weights=weights, image_size=image_size, **options
    )
    settled = str(weights) if weights is not None and weights.is_dir() else name_or_path
    prepare = preprocessing(settled, image_size=image_size)
    names = None if settled in VARIANTS else load_settings(settled).label_names
    if names is None and model.num_classes == 1000:
        names = tuple(wnid for wnid, _ in imagenet_classes())
    return Loaded(model, variables, prepare, names)
