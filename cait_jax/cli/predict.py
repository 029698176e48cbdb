"""`cait predict`: the most probable classes of photographs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_names_option, with_class_names
from cait_jax.cli.common import (
    COUNT,
    dtype_option,
    exit_if_left_out,
    image_options,
    model_options,
    run_over_images,
)
from cait_jax.cli.output import csv_lines, json_line, text_output
from cait_jax.errors import printable

_HEADS = ("image", "rank", "class", "label", "probability")


@click.command(
    "predict",
    short_help="What a model sees in photographs: classes and probabilities.",
    epilog="Example: cait predict dog.jpg holidays/ 'scans/*.png' --model cait_xs24_384 --top 3",
)
@image_options
@model_options
@dtype_option
@class_names_option
@click.option("--top", default=5, show_default=True, type=COUNT, help="Classes for each image.")
@click.option("--json", "style", flag_value="json", help="Print JSON lines, one an image.")
@click.option("--csv", "style", flag_value="csv", help="Print CSV, one line for each class.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False, allow_dash=True), metavar="FILE",
    help="Write there, as UTF-8, instead of printing.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    paths: list[Path],
    load: Any,
    dtype_policy: dict[str, Any],
    model_name: str,
    class_names: Path | None,
    top: int,
    batch_size: int,
    style: str | None,
    output: Path | None,
) -> None:
    """Print the most probable classes of each IMAGE.

    An IMAGE is a file, a folder (searched with its subfolders) or a glob in quotes. An image that cannot be
    read is named on standard error and the rest goes on; the exit status is then 1.
    """
    loaded = load(**dtype_policy)
    function = _most_probable(loaded.model, top)
    loaded = with_class_names(loaded, class_names)
    words = loaded.class_words
    broken = 0
    with text_output(output) as write:
        if style == "csv":
            write(csv_lines([_HEADS]))
        for answers in run_over_images(
            loaded, function, paths, batch_size=batch_size, title=model_name
        ):
            lines = [
                json_line({"image": str(path), "error": reason}) + "\n"
                for path, reason in answers.broken
                if style == "json"
            ]
            lines += [
                _written(path, classes, style)
                for path, classes in _ranked(answers.paths, answers.outputs, words)
            ]
            write("".join(lines))
            broken += len(answers.broken)
    exit_if_left_out(ctx, broken, len(paths))


def _most_probable(model: Any, top: int) -> Any:
    """The function from variables and images to the `top` probabilities and classes."""
    import jax

    from cait_jax.errors import UserError

    if not model.num_classes:
        raise UserError("this model has no head, so it knows no classes: see `cait features`")

    def most_probable(variables: Any, images: Any) -> Any:
        probabilities = jax.nn.softmax(model.apply(variables, images), axis=-1)
        return jax.lax.top_k(probabilities, min(top, model.num_classes))

    return most_probable


def _ranked(
    paths: Sequence[Path], outputs: Any, words: Sequence[str]
) -> Iterator[tuple[Path, list[dict[str, Any]]]]:
    if outputs is None:
        return
    for path, probabilities, classes in zip(paths, *outputs, strict=True):
        yield (
            path,
            [
                {"class": int(c), "label": words[c], "probability": float(p)}
                for p, c in zip(probabilities, classes, strict=True)
            ],
        )


def _written(path: Path, classes: list[dict[str, Any]], style: str | None) -> str:
    if style == "json":
        return json_line({"image": str(path), "predictions": classes}) + "\n"
    if style == "csv":
        return csv_lines(
            (path, rank, found["class"], found["label"], f"{found['probability']:.6f}")
            for rank, found in enumerate(classes, start=1)
        )
    lines = [f"{found['probability']:8.2%}  {printable(found['label'])}" for found in classes]
    return "\n".join([printable(str(path)), *lines]) + "\n"
