"""What commands share: the options that name a model and images, number ranges, class names."""

import dataclasses
import functools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.output import note
from cait_jax.errors import CONFIG, UserError, command_options, composed, config_flags


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
    from cait_jax.weights.pretrained import load_pretrained, load_settings, preprocessing

    model, variables = load_pretrained(
        name_or_path, weights=weights, image_size=image_size, **options
    )
    settled = str(weights) if weights is not None and weights.is_dir() else name_or_path
    prepare = preprocessing(settled, image_size=image_size)
    names = None if settled in VARIANTS else load_settings(settled).label_names
    if names is None and model.num_classes == 1000:
        names = tuple(wnid for wnid, _ in imagenet_classes())
    return Loaded(model, variables, prepare, names)


# Of the config.json of Hugging Face's transformers, of timm's, and of torchvision's folders.
_KEYS = ("id2label", "label_names", "class_to_idx")


def class_names_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--class-names`; the command gets `class_names`, a file or None, for `with_class_names`."""
    return click.option(
        "--class-names", type=click.Path(path_type=Path), metavar="FILE",
        help="The model's classes in the order of its outputs: a name a line, or JSON (a list, or numbers to "
        "names), if they were not saved with it.",
    )(function)  # fmt: skip


def with_class_names(loaded: Loaded, file: Path | None) -> Loaded:
    """The model with the names that a file gives its classes; as it is without a file.

    Raises:
      UserError: the file cannot be read, or gives another number of names than there are classes.
    """
    if file is None:
        return loaded
    names, count = read_class_names(file), loaded.model.num_classes
    if len(names) != count:
        raise UserError(
            f"{file} has {len(names)} class names and the model {count} classes: give --class-names a file "
            "with one for each, in the order of the model's outputs"
        )
    return dataclasses.replace(loaded, label_names=names)


def read_class_names(file: Path) -> tuple[str, ...]:
    """Reads names of classes in the order of a model's outputs.

    Args:
      file: UTF-8; a name a line, or JSON: a list of names, an object from index to name or from name to index, or
        an object that holds one of these as `id2label`, `label_names` or `class_to_idx`.

    Raises:
      UserError: it cannot be read, or is none of these.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--class-names {file} cannot be read: {error.strerror}; give a file of names"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--class-names {file} is not UTF-8: save it as such") from error
    if text.lstrip().startswith(("[", "{")):
        names = _of_json(file, text)
    else:
        names = [line.removesuffix("\r").strip(" \t") for line in text.rstrip().split("\n")]
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name:
            raise UserError(
                f"--class-names {file}: class {number} has no name; give every class one"
            )
    return tuple(composed(name) for name in names)


def _of_json(file: Path, text: str) -> list[Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"--class-names {file} is broken JSON ({error}): mend it") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _KEYS if key in value), value)
    if isinstance(value, dict) and all(type(index) is int for index in value.values()):
        value = {index: name for name, index in value.items()}
    if isinstance(value, dict):
        numbered = {int(key): name for key, name in value.items() if str(key).isdecimal()}
        if sorted(numbered) != list(range(len(value))):
            raise UserError(
                f"--class-names {file} does not number its {len(value)} names from 0 on: give a list"
            )
        value = [numbered[index] for index in range(len(value))]
    return list(value)


def image_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds IMAGE arguments and `--batch-size`; the command gets `paths`, the files they name."""

    @click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
    @click.option("--batch-size", default=32, show_default=True, type=COUNT)
    @functools.wraps(function)
    def with_paths(images: tuple[str, ...], **others: Any) -> Any:
        from cait_jax.data.image_files import find_images, left_out_in_words

        found = find_images(images)
        if aside := left_out_in_words(found.left_out, " ".join(images)):
            note(aside)
        return function(paths=found.paths, **others)

    return with_paths


def answers_of(
    loaded: Loaded,
    function: Callable[[Any, Any], Any],
    paths: Sequence[Path],
    *,
    batch_size: int,
    title: str,
) -> Iterator[Any]:
    """Runs a function over images with a bar, and names those that cannot be read on standard error.

    Args:
      loaded: the model.
      function: a pure function of variables and normalised images.
      paths: the files.
      batch_size: images at a time.
      title: of the bar.

    Yields:
      The `Answers` of each batch.
    """
    from cait_jax.evaluation.photographs import run_over_photographs
    from cait_jax.evaluation.scores import show_progress

    with show_progress(len(paths), title) as update:
        for answers in run_over_photographs(
            function, loaded.variables, loaded.preprocessing, paths, batch_size=batch_size
        ):
            for _, reason in answers.broken:
                note(reason)
            yield answers
            update(len(answers.paths) + len(answers.broken))


def exit_over_broken(ctx: click.Context, broken: int, total: int) -> None:
    """Ends the command with status 1 if files could not be read."""
    if broken:
        note(f"{broken} of {total} images could not be read")
        ctx.exit(1)


class Finite(click.FloatRange):
    """A number that is neither NaN nor infinite, as `click.FloatRange` lets them pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; click's own error for any other."""
        number = super().convert(value, param, ctx)
        if number - number != 0:
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1, 2**20)  # images at a time
SIDE = click.IntRange(1, 2**14)  # pixels
WORKERS = click.IntRange(0, 1024)  # processes
SEED = click.IntRange(0, 2**32 - 1)  # as config.seed
EPOCHS = Finite(0, 1e6, min_open=True)  # as config.epochs


# Arguments of the Python API that the commands call otherwise.
_OPTION_OF = {"name_or_path": "model"}


def command_words(name: str, value: Any) -> str | None:
    """The `Interface` of the command that is running; see `cait_jax.errors`."""
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
