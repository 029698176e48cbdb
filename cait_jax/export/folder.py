"""The folder of an exported network: written beside its place, checked there, then moved into it."""

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from cait_jax.errors import UserError
from cait_jax.evaluation.labels import class_words
from cait_jax.export.forward import Exported
from cait_jax.files import check_folder
from cait_jax.weights.model_json import model_to_dict
from cait_jax.weights.state_dicts import replace_files

DESCRIPTION = "export.json"
_FORMAT = 1


@contextlib.contextmanager
def unfinished(target: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `target`; on leaving without error its files are moved there.

    Files in `target` that have their names are replaced, others stay.

    Raises:
      UserError: nothing can be written there.
    """
    check_folder(target, parents=True)
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".unfinished-", dir=target.absolute().parent) as name:
        stage = Path(name)
        yield stage
        files = sorted(file for file in stage.iterdir() if file.is_file())
        replace_files(target, {file.name: file.replace for file in files})


def describe(exported: Exported, label_names: Sequence[str] | None, **more: Any) -> dict[str, Any]:
    """What `export.json` says: the network, its classes, its preprocessing, what goes in and what comes out."""
    height, width, channels = exported.image_shape
    named = label_names is not None
    return {
        "format": _FORMAT,
        **model_to_dict(exported.model),
        "label_names": [str(name) for name in label_names or ()] if named else None,
        "class_words": list(class_words(tuple(label_names or ()))) if named else None,
        "preprocessing": None
        if exported.preprocessing is None
        else exported.preprocessing.to_dict(),
        "input": {
            "shape": ["batch", height, width, channels],
            "dtype": "uint8" if exported.uint8 else "float32",
            "normalised": not exported.uint8,
        },
        "outputs": list(exported.output_names),
        "jax": jax.__version__,
        **more,
    }


def write_description(folder: Path, description: dict[str, Any]) -> None:
    """Writes `export.json`."""
    text = json.dumps(description, indent=1, allow_nan=False)
    (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


def check_export(exported: Exported, label_names: Sequence[str] | None) -> None:
    """Refuses what no format can hold.

    Raises:
      UserError: uint8 images without known preprocessing, or label names of another number than classes.
    """
    if exported.uint8 and exported.preprocessing is None:
        raise UserError(
            "uint8 images are normalised by the model's preprocessing, which is not known: save it with the model"
        )
    if label_names is not None and len(label_names) != exported.model.num_classes:
        raise UserError(
            f"there are {len(label_names)} label names and the model has {exported.model.num_classes} classes: "
            "give one name a class"
        )
