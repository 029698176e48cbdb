"""`cait report`: a page of its own about what networks see in photographs."""

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_indices, class_names_option, class_option, with_class_names
from cait_jax.cli.common import (
    COUNT,
    LoadedModel,
    dtype_option,
    exit_if_left_out,
    image_options,
    models_options,
    run_over_images,
    without_small,
)
from cait_jax.cli.output import check_writable, echo, note
from cait_jax.errors import UserError, printable

# Bytes of self-attention before compression: how much is kept unless images are chosen, and what browsers hold.
KEPT, MOST = 48 * 10**6, 256 * 10**6


@click.command(
    "report",
    short_help="A page to explore: attention of every patch, layer and head, and attribution.",
    epilog="Example: cait report dog.jpg --model cait_xxs24_224 --class tabby -o report.html",
)
@functools.partial(image_options, batch_size=1)
@models_options
@dtype_option
@class_names_option
@class_option
@click.option(
    "--top", type=COUNT, default=5, show_default=True,
    help="The most probable classes that are shown, beside those of --class.",
)  # fmt: skip
@click.option(
    "--small", is_flag=True,
    help="Keep self-attention as means over heads, in 64 steps: a fifth of the size or less.",
)  # fmt: skip
@click.option(
    "--self-attention", "chosen", multiple=True, type=click.Path(path_type=Path), metavar="IMAGE",
    help="Keep self-attention for this one of the images; may be repeated.  [default: all, or the first ones, up "
    f"to {KEPT // 10**6} MB before compression]",
)  # fmt: skip
@click.option(
    "--output", "-o", metavar="FILE.html", default=Path("report.html"), show_default=True,
    type=click.Path(path_type=Path, dir_okay=False), help="The file to write.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    paths: list[Path],
    load: Any,
    model_names: Sequence[str],
    dtype_policy: dict[str, Any],
    class_names: Path | None,
    classes: tuple[str, ...],
    top: int,
    small: bool,
    chosen: tuple[Path, ...],
    output: Path,
    batch_size: int,
) -> None:
    """Write one HTML file in which to explore what a model sees in each IMAGE; it needs no network and no server.

    Point at a patch: what it reads from every other, and who reads it, in every layer and head, before and after
    heads are mixed. Beside it are class attention, rollout and relevance for the most probable classes and for
    --class, with deletion and insertion curves. Images that cannot be read, or have fewer pixels than patches, are
    left out, and the exit status is then 1.
    """
    from cait_jax.explain.attention import check_class_token
    from cait_jax.explain.report.look import look
    from cait_jax.explain.report.page import Seer, View, build_page
    from cait_jax.files import atomic_replace

    check_writable(output, suffix=".html")
    models = [with_class_names(loaded, class_names) for loaded in load(**dtype_policy)]
    wanted = [class_indices(loaded, classes) for loaded in models]
    for loaded, name in zip(models, model_names, strict=True):
        check_class_token(loaded.model, _shown(name), "give --model a network with one")
    total = len(paths)
    paths = without_small(paths, models)
    kept = images_with_self_attention(models, paths, chosen, small=small)

    found: dict[Path, list[Any]] = {}  # for each image that can be read the arrays of each model
    for number, (loaded, name) in enumerate(zip(models, model_names, strict=True)):
        for part in (kept, [path for path in paths if path not in kept]):
            function = look(
                loaded.model,
                top=top,
                extra=wanted[number],
                head_means=small,
                with_self_attention=part is kept,
            )
            for path, arrays in _each(loaded, function, part, batch_size, name):
                found.setdefault(path, []).append(arrays)
    if not found:
        raise UserError(f"none of the {len(paths)} images could be read, so nothing was written")
    shown = [path for path in paths if path in found]
    views = [
        View(image, number, models[number].preprocessing.crop(path), arrays)
        for image, path in enumerate(shown)
        for number, arrays in enumerate(found[path])
    ]
    seers = [
        Seer(_shown(name), loaded.model, loaded.class_words if loaded.model.num_classes else ())
        for name, loaded in zip(model_names, models, strict=True)
    ]
    page = build_page(seers, [printable(path.name) for path in shown], views, head_means=small)
    with atomic_replace(output.absolute()) as temporary:
        temporary.write_text(page, encoding="utf-8")
    echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB, {len(shown)} images")
    exit_if_left_out(ctx, total - len(shown), total)


def images_with_self_attention(
    models: Sequence[LoadedModel], paths: Sequence[Path], chosen: Sequence[Path], *, small: bool
) -> list[Path]:
    """The images whose self-attention is kept: the chosen ones, else as many as fit, the first at least."""
    from cait_jax.explain.report.look import self_attention_values

    each = sum(self_attention_values(loaded.model, head_means=small) for loaded in models)
    named = {path.resolve(): path for path in chosen}
    if strangers := named.keys() - {path.resolve() for path in paths}:
        stranger = named[min(strangers)]
        raise UserError(
            f"--self-attention {stranger} is none of the images that are shown: name one of these"
        )
    kept = [path for path in paths if path.resolve() in named] or list(
        paths[: max(1, KEPT // each)]
    )
    if (size := len(kept) * each) > MOST:
        ways = "--small, a smaller --image-size, " + (
            "or fewer images by --self-attention" if len(kept) > 1 else "or one --model"
        )
        raise UserError(
            f"self-attention would be {size / 1e6:,.0f} MB, more than the {MOST // 10**6} that browsers open at "
            f"ease: choose {ways}"
        )
    if len(kept) < len(paths) and not chosen:
        note(
            f"self-attention is kept for the first {len(kept)} of {len(paths)} images, as each takes "
            f"{each / 1e6:.1f} MB of {KEPT // 10**6}: choose others by --self-attention, or all by --small"
        )
    return kept


def _each(
    loaded: LoadedModel, function: Any, paths: Sequence[Path], batch_size: int, title: str
) -> Iterator[tuple[Path, Any]]:
    """Each image that can be read, with its arrays."""
    import jax

    if not paths:
        return
    for answers in run_over_images(loaded, function, paths, batch_size=batch_size, title=title):
        for row, path in enumerate(answers.paths):
            yield path, jax.tree.map(lambda array: array[row], answers.outputs)  # noqa: B023


def _shown(name: str) -> str:
    """A model's name; of a directory, its last part."""
    return printable(Path(name).name if Path(name).is_dir() else name)
