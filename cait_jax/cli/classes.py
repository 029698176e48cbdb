"""Classes of a model on the command line: `--class-names` and `--class`."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import LoadedModel
from cait_jax.errors import UserError, composed, nearest
from cait_jax.reading import MAX_TEXT, parse_json, read_bytes

# In config.json of Hugging Face's transformers and of timm; in torchvision's ImageFolder.
_CLASS_NAME_KEYS = ("id2label", "label_names", "class_to_idx")


def class_names_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--class-names`; the command gets `class_names`, a file or None."""
    return click.option(
        "--class-names", type=click.Path(path_type=Path), metavar="FILE",
        help="The model's classes in the order of its outputs: a name a line, or JSON (a list, or numbers to "
        "names), if they were not saved with it.",
    )(function)  # fmt: skip


def with_class_names(loaded: LoadedModel, file: Path | None) -> LoadedModel:
    """The model with the class names in a file, if one is given.

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
    """Class names in the order of a model's outputs.

    The file is UTF-8: a name a line, or JSON (a list of names, an object from index to name or from name to index,
    or an object that holds one of these as `id2label`, `label_names` or `class_to_idx`).

    Raises:
      UserError: it cannot be read, or is none of these.
    """
    try:
        text = read_bytes(file, MAX_TEXT).decode("utf-8-sig")
    except OSError as error:
        raise UserError(
            f"--class-names {file} cannot be read: {error.strerror}; give a file of names"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"--class-names {file} is not UTF-8: save it as such") from error
    if text.lstrip().startswith(("[", "{")):
        names = _names_in_json(file, text)
    else:
        names = [line.removesuffix("\r").strip(" \t") for line in text.rstrip().split("\n")]
    for number, name in enumerate(names, start=1):
        if not isinstance(name, str) or not name:
            raise UserError(
                f"--class-names {file}: class {number} has no name; give every class one"
            )
    return tuple(composed(name) for name in names)


def _names_in_json(file: Path, text: str) -> list[Any]:
    try:
        value = parse_json(text)
    except ValueError as error:
        raise UserError(f"--class-names {file} is broken JSON ({error}): mend it") from error
    if isinstance(value, dict):
        value = next((value[key] for key in _CLASS_NAME_KEYS if key in value), value)
    if isinstance(value, dict) and all(type(index) is int for index in value.values()):
        value = {index: name for name, index in value.items()}
    if isinstance(value, dict):
        numbered = {
            int(key): name for key, name in value.items() if re.fullmatch("[0-9]{1,9}", str(key))
        }
        if sorted(numbered) != list(range(len(value))):
            raise UserError(
                f"--class-names {file} does not number its {len(value)} names from 0 on: give a list"
            )
        value = [numbered[index] for index in range(len(value))]
    if not isinstance(value, list):
        raise UserError(f"--class-names {file} holds no names: give a name a line, or a JSON list")
    return value


def class_option(function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds `--class`, which may be repeated; the command gets `classes`, for `class_indices`."""
    return click.option(
        "--class", "classes", multiple=True, metavar="NAME",
        help="A class by its name or number; may be repeated.  [default: the most probable]",
    )(function)  # fmt: skip


def class_indices(loaded: LoadedModel, names: Sequence[str]) -> list[int]:
    """The numbers of classes given by `--class`: a data set's name, a readable name in any case, or a number.

    Raises:
      UserError: there is no such class, or the model has no head.
    """
    words = loaded.class_words if names else []
    index = {str(i): i for i in range(len(words))}
    index |= {word.lower(): i for i, word in reversed(list(enumerate(words)))}
    index |= {name: i for i, name in enumerate(loaded.label_names or ()) if names}
    found = []
    for name in names:
        if not words:
            raise UserError("this network has no head, so it knows no classes: leave out --class")
        key = name if name in index else name.lower()
        if key not in index:
            raise UserError(f"--class: there is no class {name!r}; {nearest(name, index)}")
        found.append(index[key])
    return found
