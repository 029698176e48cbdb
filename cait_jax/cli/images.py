"""What commands over photographs share: their arguments, the loop, the account of broken files."""

import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.loading import Loaded
from cait_jax.cli.numbers import COUNT
from cait_jax.cli.output import note


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
    from cait_jax.evaluation.progress import show_progress

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
