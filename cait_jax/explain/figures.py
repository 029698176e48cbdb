"""Figures of arrays, by matplotlib (the extra `figures`). Images are uint8 (height, width, channels)."""

import importlib.util
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped

from cait_jax.errors import UserError, printable
from cait_jax.files import atomic_replace

FORMATS = ("png", "svg", "pdf")
_STYLE: Any = {
    "font.size": 8.0,
    "axes.titlesize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "svg.hashsalt": "cait",
}
SEQUENTIAL, DIVERGING = "magma", "RdBu_r"
_SIDE = 1.3  # inches of an image
_DPI = 150
Image = Shaped[np.ndarray, "height width channels"]
Map = Float[np.ndarray, "rows columns"]


def require_matplotlib(path: Path | None = None) -> None:
    """Raises UserError where matplotlib is not installed, or the path does not end as a picture's does."""
    if importlib.util.find_spec("matplotlib") is None:
        raise UserError('pictures are drawn by matplotlib: pip install "cait-jax[figures]"')
    if path is not None and path.suffix.lower().removeprefix(".") not in FORMATS:
        raise UserError(f"{path} must end in .png, .svg or .pdf to be a picture")


def save(figure: Any, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG, SVG or PDF by the file's ending; the same figure gives the same bytes.

    Raises:
      UserError: for another ending, or a file that cannot be written.
    """
    path = Path(path)
    require_matplotlib(path)
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"png": {"Software": None}, "svg": {"Date": None}, "pdf": {"CreationDate": None}}
    data = io.BytesIO()
    with figure_style():
        figure.savefig(data, format=kind, dpi=_DPI, metadata=metadata[kind])
    try:
        with atomic_replace(path) as temporary:
            temporary.write_bytes(data.getvalue())
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose another folder for the picture"
        ) from error
    return path


def attention_maps(
    image: Image,
    maps: Float[np.ndarray, "layers heads rows columns"],
    *,
    layer_names: Sequence[str],
    title: str = "",
    patch: tuple[int, int] | None = None,
) -> Any:
    """Maps over an image: a row for each layer, a column for each head and one for their mean.

    Each map has a scale of its own: black to yellow from 0 to its maximum or, where it has negative values, blue
    to red about 0. Its range is written above it. `patch`, a row and a column, is outlined.
    """
    layers, heads = maps.shape[:2]
    with figure_style():
        figure = new_figure(heads + 2, layers, title)
        grid = figure.subplots(layers, heads + 2, squeeze=False)
        for row, (axes, of_layer, name) in enumerate(zip(grid, maps, layer_names, strict=True)):
            _show_image(axes[0], image)
            axes[0].set_ylabel(name)
            if patch is not None:
                _outline(axes[0], image, of_layer.shape[1:], patch)
            for head, values in enumerate([*of_layer, of_layer.mean(axis=0)]):
                _show_map(axes[head + 1], image, values)
                label = "mean\n" if head == heads else f"head {head}\n"
                scale = f"{values.min():.2g} to {values.max():.2g}"
                axes[head + 1].set_title(label * (row == 0) + scale)
    return figure


def attention_matrices(
    matrices: Mapping[str, Float[np.ndarray, "heads queries keys"]],
    *,
    query_names: Sequence[str],
    key_names: Sequence[str],
    title: str = "",
) -> Any:
    """Heat maps of one layer: a row for each kind (scores, weights, mixed or not), a column for each head."""
    heads = next(iter(matrices.values())).shape[0]
    with figure_style():
        figure = new_figure(heads, len(matrices), title, side=2.2)
        grid = figure.subplots(len(matrices), heads, squeeze=False)
        for axes_row, (kind, values) in zip(grid, matrices.items(), strict=True):
            for head, axes in enumerate(axes_row):
                _show_matrix(figure, axes, values[head], query_names, key_names)
                axes.set_title(f"{kind.replace('_', ' ')}, head {head}")
    return figure


def attributions(
    image: Image,
    maps: Mapping[str, Map],
    *,
    curves: Mapping[str, Sequence[Any]] | None = None,
    areas: Mapping[str, tuple[float, float]] | None = None,
    title: str = "",
) -> Any:
    """One map by each method beside the image; with `curves`, deletion and insertion below.

    `areas` (deletion, insertion) stand above the maps: less and more are better.
    """
    with figure_style():
        columns = len(maps) + 1
        figure = new_figure(columns, 3 if curves else 1, title, side=1.7)
        upper = figure if curves is None else figure.subfigures(2, 1, height_ratios=[1, 1.5])[0]
        axes = upper.subplots(1, columns, squeeze=False)[0]
        _show_image(axes[0], image)
        axes[0].set_title("image")
        for axis, (name, values) in zip(axes[1:], maps.items(), strict=True):
            _show_map(axis, image, values)
            score = "\ndel {:.3f}, ins {:.3f}".format(*areas[name]) if areas else ""
            axis.set_title(f"{name.replace('_', ' ')}{score}")
        if curves is not None:
            lower = figure.subfigs[1].subplots(1, 2)
            names = "patches deleted (less area is better)", "patches inserted (more is better)"
            for part, (axis, label) in enumerate(zip(lower, names, strict=True)):
                for name, pair in curves.items():
                    fraction = np.linspace(0, 100, len(pair[part]))
                    known = name in ("random", "centre")
                    axis.plot(
                        fraction, pair[part], label=name.replace("_", " "), ls="--" if known else "-",
                        color={"random": "0.6", "centre": "0.3"}.get(name), lw=1.3,
                    )  # fmt: skip
                axis.set(xlabel=f"% of {label}", ylim=(0, 1.02), xlim=(0, 100))
            lower[0].set_ylabel("probability of the class")
            lower[1].legend(fontsize=7)
    return figure


def contact_sheet(
    images: Sequence[Image], maps: Sequence[Map], captions: Sequence[str], *, columns: int = 8
) -> Any:
    """Every image with its map beside it."""
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    with figure_style():
        figure = new_figure(columns * 2, rows, side=1.25)
        grid = figure.subplots(rows, columns * 2, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        for i, (image, values, caption) in enumerate(zip(images, maps, captions, strict=True)):
            left, right = grid[i // columns, i % columns * 2 : i % columns * 2 + 2]
            _show_image(left, image)
            left.set_title(printable(caption), fontsize=7, loc="left", parse_math=False)
            _show_map(right, image, values)
    return figure


def depth_profile(
    statistics: Mapping[str, Float[np.ndarray, "layers heads"]],
    *,
    cka: Float[np.ndarray, "layers layers"] | None = None,
    branch_ratio: Float[np.ndarray, "blocks 2"] | None = None,
    title: str = "",
) -> Any:
    """Statistics by layer: a dot for each head and a line through their mean; CKA; branch norms."""
    panels = len(statistics) + (cka is not None) + (branch_ratio is not None)
    columns = min(panels, 4)
    rows = -(-panels // columns)
    with figure_style():
        figure = new_figure(columns, rows, title, side=2.6)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis in axes[panels:]:
            axis.set_axis_off()
        for axis, (name, values) in zip(axes, statistics.items(), strict=False):
            layers = np.arange(len(values))
            axis.plot(np.repeat(layers, values.shape[1]), values.ravel(), ".", ms=3, color="0.6")
            axis.plot(layers, values.mean(axis=1), lw=1.5)
            axis.set(title=name, xlabel="block", ylim=(0, None))
            axis.xaxis.get_major_locator().set_params(integer=True)
        if branch_ratio is not None:
            axis = axes[len(statistics)]
            for part, name in enumerate(("attention", "MLP")):
                axis.plot(branch_ratio[:, part], ".-", label=name)
            axis.set(title="||branch|| / ||x||", xlabel="block", yscale="log")
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.legend()
        if cka is not None:
            axis = axes[panels - 1]
            shown = axis.imshow(cka, vmin=0, vmax=1, cmap=SEQUENTIAL, origin="lower")
            axis.set(title="CKA of features", xlabel="block", ylabel="block")
            figure.colorbar(shown, ax=axis, shrink=0.8)
    return figure


def patch_numbers(image: Image, grid: tuple[int, int], *, title: str = "") -> Any:
    """The image cut in patches, each with its number, row by row from 0."""
    rows, columns = grid
    with figure_style():
        figure = new_figure(1, 1, title, side=min(8.0, max(3.0, 0.3 * columns)))
        axis = figure.subplots()
        _show_image(axis, image)
        height, width = image.shape[0] / rows, image.shape[1] / columns
        for edge in range(1, rows):
            axis.axhline(edge * height - 0.5, color="white", lw=0.5)
        for edge in range(1, columns):
            axis.axvline(edge * width - 0.5, color="white", lw=0.5)
        for number in range(rows * columns):
            row, column = divmod(number, columns)
            axis.text(
                (column + 0.5) * width - 0.5, (row + 0.5) * height - 0.5, str(number), ha="center",
                va="center", color="white", fontsize=6,
                bbox={"facecolor": "black", "alpha": 0.45, "pad": 0.8, "edgecolor": "none"},
            )  # fmt: skip
    return figure


def flattened_patches(
    patches: Shaped[np.ndarray, "patches values"], *, title: str = "the patches, flattened"
) -> Any:
    """The matrix that the patch embedding multiplies: a row for each patch."""
    with figure_style():
        figure = new_figure(1, 1, title, side=4.0)
        axis = figure.subplots()
        axis.imshow(patches, cmap="gray", aspect="auto")
        axis.set(xlabel="value (row, column, channel)", ylabel="patch")
    return figure


def filters(
    values: Float[np.ndarray, "count side side channels"],
    *,
    captions: Sequence[str] | None = None,
    columns: int = 16,
    title: str = "",
) -> Any:
    """Patch-embedding filters or their principal components, each on a scale of its own about grey."""
    count = len(values)
    columns = min(columns, count)
    rows = -(-count // columns)
    with figure_style():
        figure = new_figure(columns, rows, title, side=0.6 if captions is None else 0.9)
        grid = figure.subplots(rows, columns, squeeze=False)
        for axis in grid.flat:
            axis.set_axis_off()
        for i, (axis, filter_) in enumerate(zip(grid.flat, values, strict=False)):
            largest = np.abs(filter_).max()
            _show_image(axis, 0.5 + 0.5 * filter_ / (largest if largest > 0 else 1.0))
            if captions is not None:
                axis.set_title(captions[i], fontsize=6)
    return figure


def position_similarity(
    similarity: Float[np.ndarray, "rows columns rows columns"], *, most: int = 14, title: str = ""
) -> Any:
    """Cosine similarity of each position embedding with all others, laid out as the patches are.

    Of more than `most` rows or columns evenly spaced ones are shown.
    """
    rows, columns = similarity.shape[:2]
    shown = [
        np.unique(np.linspace(0, n - 1, min(n, most)).round().astype(int)) for n in (rows, columns)
    ]
    with figure_style():
        figure = new_figure(len(shown[1]), len(shown[0]), title, side=0.55)
        grid = figure.subplots(len(shown[0]), len(shown[1]), squeeze=False)
        for axes, row in zip(grid, shown[0], strict=True):
            for axis, column in zip(axes, shown[1], strict=True):
                picture = axis.imshow(similarity[row, column], vmin=-1, vmax=1, cmap=DIVERGING)
                axis.set(xticks=[], yticks=[])
        figure.colorbar(picture, ax=list(grid.flat), shrink=0.6, label="cosine similarity")
    return figure


def confusion_matrix(
    counts: Int[np.ndarray, "classes classes"], class_names: Sequence[str], *, title: str = ""
) -> Any:
    """Counts of images by true class (rows) and predicted class; a cell's colour is its share of its row.

    Cells have their counts up to 25 classes, and classes their names up to 60. Of more, up to 1500, a cell is a
    whole number of pixels of a PNG, and its colour the cube root of the share.
    """
    classes = len(counts)
    named, counted = classes <= 60, classes <= 25
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [printable(name).replace("_", " ") for name in class_names] if named else []
    # Cells of whole pixels, or some of a large matrix would vanish.
    cell = max(66, 450 // classes) if counted else 33 if named else max(1, 1500 // classes)
    side = cell * classes / _DPI
    margin = round(0.8 + 0.07 * max(map(len, names), default=0), 2)
    width, height = margin + side + 1.2, margin + side + (0.5 if title else 0.2)
    with figure_style():
        from matplotlib.colors import PowerNorm
        from matplotlib.figure import Figure

        figure = Figure(figsize=(width, height))
        axes = figure.add_axes((margin / width, margin / height, side / width, side / height))
        norm = PowerNorm(1.0 if named else 1 / 3, 0.0, 1.0)
        shown = axes.imshow(share, cmap="Blues", norm=norm)
        corner = (margin + side + 0.2) / width, margin / height
        bar = figure.add_axes((*corner, 0.2 / width, side / height))
        figure.colorbar(shown, cax=bar, label="share of the true class")
        axes.set(xlabel="predicted class", ylabel="true class")
        axes.set_title(printable(title), parse_math=False)
        if named:
            axes.set_xticks(range(classes), names, rotation=90, parse_math=False)
            axes.set_yticks(range(classes), names, parse_math=False)
        for (row, column), count in np.ndenumerate(counts):
            if counted and count:
                color = "white" if share[row, column] > 0.5 else "black"
                axes.text(column, row, f"{count}", ha="center", va="center", color=color)
    return figure


def new_figure(columns: int, rows: int, title: str = "", side: float = _SIDE) -> Any:
    """An empty figure for so many panels, each of `side` inches."""
    from matplotlib.figure import Figure

    size = (columns * side + 0.4, rows * side * 1.15 + 0.3 + 0.25 * bool(title))
    figure = Figure(figsize=size, layout="constrained")
    if title:
        figure.suptitle(printable(title), fontsize=9, parse_math=False)
    return figure


def figure_style() -> Any:
    """The style of every figure, as a context."""
    require_matplotlib()
    import matplotlib as mpl

    return mpl.rc_context(_STYLE)


def _show_image(axis: Any, image: Image) -> None:
    gray = image.shape[-1] == 1
    axis.imshow(image[..., 0] if gray else image, cmap="gray" if gray else None)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _show_map(axis: Any, image: Image, values: Map) -> None:
    """A map over its image in grey; where it has negative values about 0 in two colours."""
    height, width = image.shape[:2]
    grey = image.mean(axis=-1) if image.shape[-1] > 1 else image[..., 0]
    axis.imshow(grey, cmap="gray", extent=(0, width, height, 0))
    most = float(np.abs(values).max()) or 1.0
    signed = bool((values < 0).any())
    axis.imshow(
        values, cmap=DIVERGING if signed else SEQUENTIAL, vmin=-most if signed else 0.0, vmax=most,
        alpha=0.7, extent=(0, width, height, 0),
    )  # fmt: skip
    axis.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0))
    for spine in axis.spines.values():
        spine.set_visible(False)


def _show_matrix(
    figure: Any, axis: Any, values: Any, query_names: Sequence[str], key_names: Sequence[str]
) -> None:
    signed = bool((values < 0).any())
    most = float(np.abs(values).max()) or 1.0
    picture = axis.imshow(
        values, cmap=DIVERGING if signed else SEQUENTIAL, vmin=-most if signed else 0.0, vmax=most,
        aspect="auto",
    )  # fmt: skip
    figure.colorbar(picture, ax=axis, shrink=0.8)
    for set_ticks, names in ((axis.set_xticks, key_names), (axis.set_yticks, query_names)):
        step = max(1, -(-len(names) // 16))
        at = np.arange(0, len(names), step)
        set_ticks(at, [names[int(i)] for i in at], fontsize=5)
    axis.tick_params(axis="x", rotation=90)


def _outline(axis: Any, image: Image, grid: tuple[int, ...], patch: tuple[int, int]) -> None:
    from matplotlib.patches import Rectangle

    height, width = image.shape[0] / grid[0], image.shape[1] / grid[1]
    corner = (patch[1] * width - 0.5, patch[0] * height - 0.5)
    axis.add_patch(Rectangle(corner, width, height, fill=False, edgecolor="red", lw=1.2))
