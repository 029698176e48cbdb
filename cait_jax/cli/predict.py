"""`cait predict`: what a model sees in photographs."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO

import click

from cait_jax.cli.loading import dtype_option, model_options
from cait_jax.cli.output import csv_lines, json_line

_HEADS = ("image", "rank", "class", "label", "probability")


@click.command(
    "predict",
    short_help="What a model sees in photographs: classes and probabilities.",
    epilog="Example: cait predict dog.jpg holidays/ 'scans/*.png' --model cait_xs24_384 --top 3",
)
@click.argument("images", nargs=-1, required=True, metavar="IMAGE...")
@model_options
@dtype_option
@click.option(
    "--top", default=5, show_default=True, type=click.IntRange(1), help="Classes for each image."
)
@click.option("--batch-size", default=32, show_default=True, type=click.IntRange(1))
@click.option("--json", "style", flag_value="json", help="Print JSON lines, one an image.")
@click.option("--csv", "style", flag_value="csv", help="Print CSV, one line for each class.")
@click.option(
    "--output", "-o", type=click.File("w", lazy=False), default="-", metavar="FILE",
    help="Write there instead of printing.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    images: tuple[str, ...],
    load: Any,
    numerics: dict[str, Any],
    model_name: str,
    top: int,
    batch_size: int,
    style: str | None,
    output: TextIO,
) -> None:
    """Print the most probable classes of each IMAGE.

    An IMAGE is a file, a folder (searched with its subfolders) or a glob in quotes. An image that cannot be
    read is named on standard error and the rest goes on; the exit status is then 1.
    """
    from cait_jax.data.folder import expand_images
    from cait_jax.evaluation.photographs import run_over_photographs
    from cait_jax.evaluation.progress import show_progress

    paths = expand_images(images)
    loaded = load(**numerics)
    words = loaded.class_words
    broken = 0
    if style == "csv":
        output.write(csv_lines([_HEADS]))
    with show_progress(len(paths), model_name) as update:
        for answers in run_over_photographs(
            _most_probable(loaded.model, top),
            loaded.variables,
            loaded.preprocessing,
            paths,
            batch_size=batch_size,
        ):
            for path, reason in answers.broken:
                click.echo(f"cait: {reason}", err=True)
                if style == "json":
                    output.write(json_line({"image": str(path), "error": reason}) + "\n")
            for path, classes in _ranked(answers.paths, answers.outputs, words):
                output.write(_written(path, classes, style))
            output.flush()
            broken += len(answers.broken)
            update(len(answers.paths) + len(answers.broken))
    if broken:
        click.echo(f"cait: {broken} of {len(paths)} images could not be read", err=True)
        ctx.exit(1)


def _most_probable(model: Any, top: int) -> Any:
    """The function of variables and images that gives the `top` classes and their probabilities."""
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
    lines = [f"{found['probability']:8.2%}  {found['label']}" for found in classes]
    return "\n".join([str(path), *lines]) + "\n"
