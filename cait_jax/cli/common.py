"""What commands share: the options that name a model and images, number ranges."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.output import note
from cait_jax.errors import (
    CONFIG,
    UNSPECIFIED,
    Interface,
    UserError,
    config_flags,
)
from cait_jax.renamed import KEY_OF

# Arguments of the Python API whose options have another name.
_OPTION_OF = {"name_or_path": "model"}


class Finite(click.FloatRange):
    """A `click.FloatRange` that refuses NaN and infinity."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number, or click's error."""
        number = super().convert(value, param, ctx)
        if number - number != 0:
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1, 2**20)  # images at a time
SIDE = click.IntRange(1, 2**14)  # pixels
WORKERS = click.IntRange(0, 1024)  # processes
SEED = click.IntRange(0, 2**32 - 1)  # as config.seed
EPOCHS = Finite(0, 1e6, min_open=True)  # as config.epochs


def command_options(
    options: Mapping[str, str], switches: frozenset[str] = frozenset()
) -> Interface:
    """The `Interface` of a command: argument to option, and the arguments whose option takes no value."""
    argument_of = {key: argument for argument, key in KEY_OF.items()}

    def written(name: str, value: Any) -> str | None:
        argument = argument_of.get(name, name)
        option = options.get(argument)
        if option is None or argument in switches or value is UNSPECIFIED:
            return option
        return f"{option} {value}"

    return written


def running_command_options(name: str, value: Any) -> str | None:
    """`cait_jax.errors.Interface` of the running command: a setting is written as the option it has for it."""
    context = click.get_current_context(silent=True)
    if context is None:
        return None
    if context.allow_extra_args and name.startswith(CONFIG):  # `cait plan` takes train.py's flags
        return config_flags(name, value)
    declared = {
        str(param.name): param
        for param in context.command.params
        if isinstance(param, click.Option)
    }
    of_setting = {param: option.opts[0] for param, option in declared.items()}
    of_setting |= {
        argument: of_setting[param] for argument, param in _OPTION_OF.items() if param in of_setting
    }
    is_flag = frozenset(param for param, option in declared.items() if option.is_flag)
    return command_options(of_setting, is_flag)(name, value)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model with its variables and preprocessing.

    `label_names` are its classes in the order of the logits, by the data set's names; None if not known.
    """

    model: Any
    variables: Any
    preprocessing: Any
    label_names: tuple[str, ...] | None

    @property
    def class_words(self) -> list[str]:
        """A readable name of each class."""
        from cait_jax.evaluation.labels import class_words

        if self.label_names is None:
            return [str(i) for i in range(self.model.num_classes)]
        return list(class_words(self.label_names))


weights_option = click.option(
    "--weights", type=click.Path(path_type=Path), metavar="PATH",
    help="Weights instead of the released ones: a .safetensors or .pth file, a directory, or "
    "hf://NAMESPACE/NAME.",
)  # fmt: skip
image_size_option = click.option(
    "--image-size", type=SIDE, metavar="PIXELS", help="Another resolution."
)


def model_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--model` and its like; the command gets `load`, a function of model attributes, and `model_name`."""

    @click.option(
        "--model", "-m", required=True, metavar="NAME|DIR",
        help="A name of `cait models`, a saved model's directory or hf://NAMESPACE/NAME, or a training run's.",
    )  # fmt: skip
    @_source_options
    @functools.wraps(function)
    def with_load(model: str, load_named: Callable[..., LoadedModel], **others: Any) -> Any:
        return function(load=functools.partial(load_named, model), model_name=model, **others)

    return with_load


def models_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `model_options`, for one or two: the command gets `load`, which gives a list, and `model_names`."""

    @click.option(
        "--model", "-m", "model", multiple=True, required=True, metavar="NAME|DIR",
        help="A name of `cait models`, a saved model's directory or hf://NAMESPACE/NAME, or a training run's; "
        "given twice, both are shown side by side.",
    )  # fmt: skip
    @_source_options
    @functools.wraps(function)
    def with_load(
        model: tuple[str, ...], load_named: Callable[..., LoadedModel], **others: Any
    ) -> Any:
        if len(model) > 2:
            raise UserError(f"--model is given {len(model)} times: give it once or twice")

        def load(**attributes: Any) -> list[LoadedModel]:
            return [load_named(name, several=len(model) > 1, **attributes) for name in model]

        return function(load=load, model_names=model, **others)

    return with_load


def _source_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds what `--model` leaves open; the command gets `load_named`, a function of its name and attributes."""

    @weights_option
    @image_size_option
    @click.option("--antialias", is_flag=True, help="Resize positions for it as timm does.")
    @click.option(
        "--ema",
        is_flag=True,
        help="Of a training run, or of a file that holds both, the averaged parameters.",
    )
    @functools.wraps(function)
    def with_load_named(
        weights: Path | None, image_size: int | None, antialias: bool, ema: bool, **others: Any
    ) -> Any:
        def load_named(name: str, several: bool = False, **attributes: Any) -> LoadedModel:
            if several and weights is not None:
                raise UserError(
                    f"--weights {weights} could be of either --model: give one --model, or save each with its "
                    "weights (`cait convert`) and name the directories"
                )
            return load_model(
                name,
                weights=weights,
                image_size=image_size,
                antialias=antialias,
                ema=ema,
                **attributes,
            )

        return function(load_named=load_named, **others)

    return with_load_named


def dtype_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--dtype`; the command gets `dtype_policy`, attributes of the model."""

    @click.option(
        "--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32", show_default=True,
        help="Of the computation; float32 is exact on every device, bfloat16 fast.",
    )  # fmt: skip
    @functools.wraps(function)
    def with_dtype_policy(dtype: str, **others: Any) -> Any:
        precision = "highest" if dtype == "float32" else None
        return function(dtype_policy={"dtype": dtype, "precision": precision}, **others)

    return with_dtype_policy


def load_model(
    name_or_path: str, *, weights: Path | None, image_size: int | None, **options: Any
) -> LoadedModel:
    """Loads a model as `cait_jax.load_pretrained` does, with preprocessing and class names.

    Those of `weights` count where it is a directory, or on the hub.
    """
    from cait_jax.evaluation.labels import imagenet_classes
    from cait_jax.models.variants import VARIANTS
    from cait_jax.models.zoo import check_attention_memory
    from cait_jax.weights import pretrained
    from cait_jax.weights.hub_files import as_written, is_address
    from cait_jax.weights.model_json import replace_attributes
    from cait_jax.weights.pretrained import load_pretrained, load_settings, preprocessing

    if image_size is not None:  # before positions are resized to it
        described = pretrained.load_model(name_or_path)
        check_attention_memory(replace_attributes(described, image_size=image_size))
    model, variables = load_pretrained(
        name_or_path, weights=weights, image_size=image_size, **options
    )
    source = name_or_path
    if weights is not None and (weights.is_dir() or is_address(weights)):
        source = as_written(weights)
    prepare = preprocessing(source, image_size=image_size)
    names = None if source in VARIANTS else load_settings(source).label_names
    if names is None and model.num_classes == 1000:
        names = tuple(wnid for wnid, _ in imagenet_classes())
    return LoadedModel(model, variables, prepare, names)


def image_options(function: Callable[..., Any], *, batch_size: int = 32) -> Callable[..., Any]:
    """Adds IMAGE arguments and `--batch-size`; the command gets `paths`, the files they name."""

    @click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
    @click.option("--batch-size", default=batch_size, show_default=True, type=COUNT)
    @functools.wraps(function)
    def with_paths(images: tuple[str, ...], **others: Any) -> Any:
        from cait_jax.cores import use_cores
        from cait_jax.data.image_files import find_images, left_out_in_words

        found = find_images(images)
        if left_out := left_out_in_words(found.left_out, " ".join(images)):
            note(left_out)
        together = min(len(found.paths), others["batch_size"])
        use_cores(lambda devices: devices <= together)
        return function(paths=found.paths, **others)

    return with_paths


def run_over_images(
    loaded: LoadedModel,
    function: Callable[[Any, Any], Any],
    paths: Sequence[Path],
    *,
    batch_size: int,
    title: str,
) -> Iterator[Any]:
    """Runs a pure function of variables and normalised images over files, with a progress bar.

    Yields the `Answers` of each batch; images that cannot be read are named on standard error.
    """
    from cait_jax.evaluation.features import run_over_photographs
    from cait_jax.evaluation.scores import show_progress

    with show_progress(len(paths), title) as update:
        for answers in run_over_photographs(
            function, loaded.variables, loaded.preprocessing, paths, batch_size=batch_size
        ):
            for _, reason in answers.broken:
                note(reason)
            yield answers
            update(len(answers.paths) + len(answers.broken))


def without_small(paths: Sequence[Path], models: Sequence[LoadedModel]) -> list[Path]:
    """The images whose shorter side has a pixel for each patch of every network's; a note names each other.

    One that cannot be read is kept: it is named when it is decoded.

    Raises:
      UserError: none is left.
    """
    from cait_jax.data.decode import read_size
    from cait_jax.data.split import BrokenImage
    from cait_jax.explain.attention import patch_grid
    from cait_jax.reading import MAX_IMAGE, read_bytes

    patches = max(min(patch_grid(loaded.model)) for loaded in models)
    kept = []
    for path in paths:
        try:
            side = min(read_size(read_bytes(path, MAX_IMAGE)))
        except (OSError, BrokenImage):
            side = patches
        if side >= patches:
            kept.append(path)
        else:
            note(
                f"{path} is left out: its shorter side has {side} pixels, fewer than the {patches} patches of the "
                "network's"
            )
    if not kept:
        raise UserError("every image is left out: give larger ones, or a smaller --image-size")
    return kept


def exit_if_left_out(ctx: click.Context, count: int, total: int) -> None:
    """Exits with status 1 if images, which are named by then, were left out."""
    if count:
        note(f"{count} of {total} images were left out")
        ctx.exit(1)
