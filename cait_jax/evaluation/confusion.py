"""The picture of a confusion matrix."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from cait_jax.errors import UserError, printable
from cait_jax.files import atomic_replace

_MOST_COUNTS = 25
_MOST_NAMES = 60
_DPI = 100
_MARGIN, _BAR = 0.8, 1.2  # inches


def save_confusion(
    confusion: Int[np.ndarray, "classes classes"],
    class_names: Sequence[str],
    path: str | os.PathLike[str],
    title: str | None = None,
) -> None:
    """Draws a confusion matrix to a PNG file, deterministically.

    Rows are true classes, columns predicted ones, and a cell's colour is its share of its row. Cells have their
    counts up to 25 classes, and classes their names up to 60. Of more, up to 1000, a cell is a whole number of
    pixels, and its colour the cube root of the share.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(
            'pictures are drawn by matplotlib: pip install "cait-jax[figures]"'
        ) from error

    classes = len(confusion)
    named, counted = classes <= _MOST_NAMES, classes <= _MOST_COUNTS
    images = confusion.sum(axis=1, keepdims=True)
    share = confusion / np.maximum(images, 1)

    names = [printable(name).replace("_", " ") for name in class_names] if named else []
    # Cells of whole pixels, or some of a large matrix would vanish.
    margin = round(_MARGIN + 0.085 * max(map(len, names), default=0), 2)
    side = _cell_pixels(classes) * classes / _DPI
    width, height = margin + side + _BAR, margin + side + (0.5 if title else 0.2)
    figure = Figure(figsize=(width, height), dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
    picture = axes.imshow(
        share,
        cmap="Blues",
        norm=PowerNorm(1.0 if named else 1 / 3, 0.0, 1.0),
        interpolation="nearest",
    )
    bar = figure.add_axes(
        ((margin + side + 0.2) / width, margin / height, 0.2 / width, side / height)
    )
    figure.colorbar(picture, cax=bar, label="share of the true class")
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    if title:
        axes.set_title(printable(title), parse_math=False)
    if named:
        axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
        axes.set_yticks(range(classes), names, parse_math=False)
    if counted:
        _write_counts(axes, confusion, share)

    file = io.BytesIO()
    canvas.print_png(file, metadata={"Software": None})
    _write(Path(path), file.getvalue())


def _cell_pixels(classes: int) -> int:
    if classes <= _MOST_COUNTS:
        return max(45, 300 // classes)
    return 22 if classes <= _MOST_NAMES else max(1, 1000 // classes)


def _write_counts(
    axes: Any,
    confusion: Int[np.ndarray, "classes classes"],
    share: Float[np.ndarray, "classes classes"],
) -> None:
    for (row, column), count in np.ndenumerate(confusion):
        if count:
            color = "white" if share[row, column] > 0.5 else "black"
            axes.text(column, row, f"{count}", ha="center", va="center", color=color, fontsize=8)


def _write(path: Path, data: bytes) -> None:
    try:
        with atomic_replace(path) as temporary:
            temporary.write_bytes(data)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose another folder for the picture"
        ) from error
