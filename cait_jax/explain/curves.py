"""Figures of training runs: metrics, LayerScale and branch norms over time, and what a sweep found."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from cait_jax.errors import printable
from cait_jax.explain.figures import SEQUENTIAL, figure_style, new_figure

_NAME = 60


def training_curves(runs: Mapping[str, Sequence[Mapping[str, Any]]], *, title: str = "") -> Any:
    """Loss, accuracy, learning rate and gradient norm of runs, from the rows of their metrics.

    A colour for each run, whose name the legend below has, its last 60 characters at most; lines are of training,
    dots of evaluation.
    """
    panels: dict[str, tuple[str, ...]] = {
        "loss": ("train/loss", "eval/loss"),
        "accuracy": ("train/accuracy", "eval/accuracy"),
        "learning rate": ("train/learning_rate",),
        "gradient norm": ("train/grad_norm",),
    }
    with figure_style():
        figure = new_figure(4, 1, title, side=2.8)
        for axis, (name, keys) in zip(figure.subplots(1, 4), panels.items(), strict=True):
            for color, rows in enumerate(runs.values()):
                for key, style in zip(keys, ("-", ".--"), strict=False):
                    points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
                    if points:
                        axis.plot(
                            *np.transpose(points), style, lw=1.2, ms=4, color=f"C{color % 10}",
                            alpha=0.6 if style == "-" and len(keys) > 1 else 1.0,
                        )  # fmt: skip
            axis.set(title=name, xlabel="step")
            if axis.lines and name in ("loss", "gradient norm"):
                axis.set_yscale("log")
            if not axis.lines:
                axis.text(0.5, 0.5, "not recorded", ha="center", transform=axis.transAxes)
        _legend(figure, runs)
    return figure


def _legend(figure: Any, runs: Sequence[str] | Mapping[str, Any]) -> None:
    """Under the panels, so that long names take no room from them."""
    from matplotlib.lines import Line2D

    names = [printable(run) for run in runs]
    names = [name if len(name) <= _NAME else f"…{name[1 - _NAME :]}" for name in names]
    lines = [Line2D([], [], color=f"C{i % 10}", label=name) for i, name in enumerate(names)]
    lines += [
        Line2D([], [], color="0.4", lw=1.2, alpha=0.6, label="training"),
        Line2D([], [], color="0.4", ls="--", marker=".", label="evaluation"),
    ]
    figure.legend(handles=lines, loc="outside lower center", ncols=3, fontsize=7)


def layer_scales(
    steps: Sequence[int],
    values: Mapping[str, Float[np.ndarray, "records blocks width"]],
    *,
    title: str = "",
) -> Any:
    """LayerScale of each branch: mean |gamma| of blocks over time; |gamma| by block and channel at the end."""
    with figure_style():
        figure = new_figure(2, len(values), title, side=3.2)
        grid = figure.subplots(len(values), 2, squeeze=False)
        for (left, right), (branch, gamma) in zip(grid, values.items(), strict=True):
            size = np.abs(gamma)
            _lines_by_block(figure, left, steps, size.mean(axis=2))
            left.set(title=f"{branch}: mean |gamma|", xlabel="step", yscale="log")
            shown = right.imshow(size[-1], aspect="auto", cmap=SEQUENTIAL, vmin=0)
            right.set(
                title=f"{branch}: |gamma|, step {steps[-1]}", xlabel="channel", ylabel="block"
            )
            figure.colorbar(shown, ax=right, shrink=0.8)
    return figure


def branch_ratios(
    steps: Sequence[int], values: Float[np.ndarray, "records blocks 2"], *, title: str = ""
) -> Any:
    """`||branch|| / ||x||` of each block over time, of attention and of MLPs."""
    with figure_style():
        figure = new_figure(2, 1, title, side=3.2)
        for part, (axis, name) in enumerate(
            zip(figure.subplots(1, 2), ("attention", "MLP"), strict=True)
        ):
            _lines_by_block(figure, axis, steps, values[:, :, part])
            axis.set(title=f"{name}: ||branch|| / ||x||", xlabel="step", yscale="log")
    return figure


def _lines_by_block(
    figure: Any, axis: Any, steps: Sequence[int], values: Float[np.ndarray, "records blocks"]
) -> None:
    import matplotlib as mpl

    colors = mpl.colormaps["viridis"]
    blocks = values.shape[1]
    for block in range(blocks):
        axis.plot(steps, values[:, block], lw=1.0, color=colors(block / max(1, blocks - 1)))
    norm = mpl.colors.Normalize(0, blocks - 1)
    scale = mpl.cm.ScalarMappable(norm=norm, cmap=colors)
    figure.colorbar(scale, ax=axis, shrink=0.8, label="block")


def sweep_plot(rows: Sequence[Mapping[str, Any]], varied: Sequence[str], metric: str) -> Any:
    """A metric of runs against each key that varies: a dot a run, a line through the means.

    Args:
      rows: each with `varied`, texts by key, and `metrics`.
      varied: the keys to show.
      metric: the one to show.
    """
    with figure_style():
        figure = new_figure(len(varied), 1, side=2.8)
        for axis, name in zip(np.atleast_1d(figure.subplots(1, len(varied))), varied, strict=True):
            points: dict[str, list[float]] = {}
            for row in rows:
                if (value := row["metrics"].get(metric)) is not None:
                    points.setdefault(row["varied"][name], []).append(value)
            places = _places(list(points))
            for text, values in points.items():
                axis.plot([places[text]] * len(values), values, "o", ms=4, color="C0", alpha=0.6)
            order = sorted(points, key=places.__getitem__)
            means = [float(np.mean(points[text])) for text in order]
            axis.plot([places[text] for text in order], means, "-", lw=1.2, color="C0")
            if min(places.values()) > 0 and max(places.values()) >= 10 * min(places.values()):
                axis.set_xscale("log")
            if set(places.values()) == set(range(len(places))):
                axis.set_xticks(
                    list(places.values()), [printable(text) for text in places], parse_math=False
                )
            axis.set(xlabel=printable(name.rpartition(".")[2]), ylabel=metric.removeprefix("eval/"))
    return figure


def _places(texts: Sequence[str]) -> dict[str, float]:
    """Where values are on an axis: numbers at their value, words side by side."""
    try:
        numbers = [float(text) for text in texts]
    except ValueError:
        return {text: float(i) for i, text in enumerate(texts)}
    if not np.isfinite(numbers).all():
        return {text: float(i) for i, text in enumerate(texts)}
    return dict(zip(texts, numbers, strict=True))
