"""`cait explain`: pictures of what a network sees in photographs, and their numbers."""

import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_indices, class_names_option, class_option, with_class_names
from cait_jax.cli.common import (
    SEED,
    LoadedModel,
    dtype_option,
    exit_if_left_out,
    image_options,
    model_options,
    run_over_images,
    without_small,
)
from cait_jax.cli.output import echo, table
from cait_jax.errors import UserError
from cait_jax.explain.attribution import FOR_A_CLASS, METHODS
from cait_jax.files import check_folder

SHOWN = ("attribution", "attention", "patch", "matrices", "depth", "patches")


@click.command(
    "explain",
    short_help="Pictures of attention and attribution in photographs, and how far to trust them.",
    epilog="Example: cait explain dog.jpg --model cait_xs24_384 --show attention --methods all -o seen/",
)
@functools.partial(image_options, batch_size=4)
@model_options
@dtype_option
@class_names_option
@class_option
@click.option(
    "--method", "methods", multiple=True, type=click.Choice(tuple(METHODS)),
    help="Attribution method; may be repeated. [default: class_attention, and relevance with a head]",
)  # fmt: skip
@click.option(
    "--methods", "all_methods", type=click.Choice(["all"]),
    help="Every method that fits the network, with deletion and insertion curves beside a random map and a "
    "blob in the centre.",
)  # fmt: skip
@click.option(
    "--show", multiple=True, type=click.Choice(SHOWN), default=["attribution"], show_default=True,
    help="attention: of the class token, every layer and head; patch: self-attention from --patch; "
    "matrices: scores and weights of --layer; depth: statistics by layer; patches: the cut image and the "
    "embedding. May be repeated.",
)  # fmt: skip
@click.option(
    "--patch",
    type=click.IntRange(0, 2**28),
    help="A patch, counted row by row.  [default: the middle]",
)
@click.option(
    "--layer",
    type=click.IntRange(0, 1023),
    default=0,
    show_default=True,
    help="Of --show matrices.",
)
@click.option(
    "--steps", type=click.IntRange(1, 1000), default=14, show_default=True, help="Points of curves."
)
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of the random maps.")
@click.option(
    "--format", "suffix", type=click.Choice(["png", "svg", "pdf"]), default="png", show_default=True
)
@click.option(
    "--output", "-o", metavar="DIR", default=Path("explain"), show_default=True,
    type=click.Path(path_type=Path, file_okay=False), help="The directory to write in.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    paths: list[Path],
    load: Any,
    dtype_policy: dict[str, Any],
    model_name: str,
    class_names: Path | None,
    classes: tuple[str, ...],
    methods: tuple[str, ...],
    all_methods: str | None,
    show: tuple[str, ...],
    patch: int | None,
    layer: int,
    steps: int,
    seed: int,
    suffix: str,
    output: Path,
    batch_size: int,
) -> None:
    """Draw what a network sees in each IMAGE, and write the numbers beside the pictures as NAME.npz.

    Several images, as in a folder, also make a contact sheet. An attribution is of --class, by default of the most
    probable class. Images that cannot be read, or have fewer pixels than patches, are left out, and the exit
    status is then 1.
    """
    from cait_jax.explain.figures import require_matplotlib, save
    from cait_jax.explain.overview import overview

    require_matplotlib()
    check_folder(output)
    loaded = with_class_names(load(**dtype_policy), class_names)
    scored = all_methods is not None
    chosen = class_indices(loaded, classes)
    methods = _fitting_methods(loaded.model, methods, scored=scored, classes=chosen)
    _check_model(loaded.model, show, patch, layer)
    function = overview(
        loaded.model,
        show,
        methods=methods,
        classes=chosen,
        patch=patch,
        layer=layer,
        steps=steps if scored else None,
        seed=seed,
    )
    total = len(paths)
    paths = without_small(paths, [loaded])
    output.mkdir(parents=True, exist_ok=True)
    names, broken, seen = _file_names(paths), total - len(paths), []
    for answers in run_over_images(
        loaded, function, paths, batch_size=batch_size, title=model_name
    ):
        broken += len(answers.broken)
        for row, path in enumerate(answers.paths):
            arrays, name = _of_image(answers.outputs, row), names[path]
            image = loaded.preprocessing.crop(path)
            written = [_write_numbers(output / f"{name}.npz", image, arrays)]
            for part, figure in _figures(loaded, image, arrays, layer):
                written.append(save(figure, output / f"{name}.{part}.{suffix}"))
            echo("".join(f"{file}\n" for file in written).rstrip())
            seen.append((image, arrays, name))
    if "patches" in show:
        for part, figure in _embedding_figures(loaded):
            echo(str(save(figure, output / f"{part}.{suffix}")))
    if len(seen) > 1 and "attribution" in show:
        echo(str(save(_contact_sheet(loaded, seen), output / f"contact_sheet.{suffix}")))
    if scored and seen:
        echo(_scores([arrays for _, arrays, _ in seen]))
    exit_if_left_out(ctx, broken, total)


def _fitting_methods(
    model: Any, methods: Sequence[str], *, scored: bool, classes: Sequence[int]
) -> tuple[str, ...]:
    """The methods asked for; else all that fit the network if `scored`, or one or two."""
    from cait_jax.explain.attention import check_class_token, check_transformer

    check_transformer(model)
    if "class_attention" in methods:
        check_class_token(model)
    if not model.num_classes and (scored or classes or any(m in FOR_A_CLASS for m in methods)):
        raise UserError(
            "this network has no head and knows no classes: leave out --class and --methods all, and choose "
            "--method class_attention or rollout"
        )
    fitting = tuple(
        method
        for method in METHODS
        if (method != "class_attention" or model.class_token != "mean")
        and (method not in FOR_A_CLASS or model.num_classes)
    )
    if scored:
        return fitting
    default = (fitting[0], "relevance") if model.num_classes else fitting[:1]
    return tuple(dict.fromkeys(methods or default))


def _check_model(model: Any, show: Sequence[str], patch: int | None, layer: int) -> None:
    from cait_jax.explain.attention import check_class_token, patch_grid

    rows, columns = patch_grid(model)
    if patch is not None and patch >= rows * columns:
        raise UserError(
            f"there is no --patch {patch}: an image has {rows} x {columns}, counted row by row from 0 to "
            f"{rows * columns - 1}"
        )
    last = model.depth + (model.class_depth or 0) - 1
    if layer > last:
        raise UserError(f"there is no --layer {layer}: they are counted from 0 to {last}")
    if "attention" in show:
        check_class_token(model)


def _file_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A name for each image's files: its own without the ending, numbered where several images share it."""
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for path in paths:
        name, number = path.stem, 2
        while name in taken:
            name, number = f"{path.stem}-{number}", number + 1
        taken.add(name)
        names[path] = name
    return names


def _of_image(arrays: Any, row: int) -> Any:
    """The arrays of one image of a batch, in the order of methods and kinds, which jit has sorted by name."""
    from cait_jax.explain.attention import KINDS

    if not isinstance(arrays, dict):
        return arrays[row]
    order = [*METHODS, *KINDS]
    names = sorted(arrays, key=lambda name: order.index(name) if name in order else len(order))
    return {name: _of_image(arrays[name], row) for name in names}


def _write_numbers(path: Path, image: Any, arrays: Any) -> Path:
    """Writes every array to an npz file: nested ones as `attribution/rollout`."""
    import numpy as np

    from cait_jax.files import atomic_replace

    flat = {"image": image}
    for name, value in arrays.items():
        parts = value if isinstance(value, dict) else {"": value}
        flat |= {f"{name}/{part}".rstrip("/"): array for part, array in parts.items()}
    with atomic_replace(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **flat)
    return path


def _figures(loaded: LoadedModel, image: Any, arrays: Any, layer: int) -> Iterator[tuple[str, Any]]:
    """Each picture of an image, with its part of the file's name."""
    from cait_jax.explain import figures
    from cait_jax.explain.attention import patch_grid, token_names
    from cait_jax.explain.faithfulness import area

    model = loaded.model
    rows, columns = patch_grid(model)
    for number in range(len(arrays.get("classes", [0])) if "attribution" in arrays else 0):
        maps = {m: values[number] for m, values in arrays["attribution"].items()}
        curves = areas = None
        if "deletion" in arrays:
            curves = {
                m: (arrays["deletion"][m][number], arrays["insertion"][m][number]) for m in maps
            }
            areas = {m: (float(area(d)), float(area(i))) for m, (d, i) in curves.items()}
        part = "attribution" if number == 0 else f"attribution-{number + 1}"
        title = _title(loaded, arrays, number)
        yield part, figures.attributions(image, maps, curves=curves, areas=areas, title=title)
    if "class_token" in arrays:
        maps = arrays["class_token"]
        first = model.class_token if isinstance(model.class_token, int) else 0
        names = [f"{'class ' * bool(model.class_depth)}block {first + i}" for i in range(len(maps))]
        title = "what the class token reads, in each block and head"
        yield "attention", figures.attention_maps(image, maps, layer_names=names, title=title)
    if "read_by_patch" in arrays:
        patch = divmod(int(arrays["patch"]), columns)
        for part, words in (
            ("read_by_patch", "what patch {} reads"),
            ("readers_of_patch", "who reads patch {}"),
        ):
            maps = arrays[part]
            names = [f"block {i}" for i in range(len(maps))]
            title = words.format(int(arrays["patch"]))
            yield (
                part,
                figures.attention_maps(image, maps, layer_names=names, title=title, patch=patch),
            )
    if "matrices" in arrays:
        keys = token_names(model, layer)
        queries = keys[: arrays["matrices"]["weights"].shape[1]]
        yield (
            "matrices",
            figures.attention_matrices(
                arrays["matrices"], query_names=queries, key_names=keys, title=f"layer {layer}"
            ),
        )
    if "entropy" in arrays:
        titles = {
            "entropy": "entropy (nats)",
            "distance": "mean distance (pixels)",
            "share_on_special": "share on class token",
            "share_on_most_read": "share on most-read patch",
        }
        statistics = {title: arrays[name] for name, title in titles.items() if name in arrays}
        yield (
            "depth",
            figures.depth_profile(
                statistics, cka=arrays["cka"], branch_ratio=arrays["branch_ratio"]
            ),
        )
    if "patches" in arrays:
        yield "patches", figures.patch_numbers(image, (rows, columns))
        yield "flattened", figures.flattened_patches(arrays["patches"])


def _embedding_figures(loaded: LoadedModel) -> Iterator[tuple[str, Any]]:
    """Pictures of the patch and position embedding, which are the same for every image."""
    import numpy as np

    from cait_jax.explain import figures, patches

    model, variables = loaded.model, loaded.variables
    filters = patches.embedding_filters(model, variables)
    yield "filters", figures.filters(np.asarray(filters), title="filters of the patch embedding")
    principal, share = patches.principal_filters(filters, min(16, len(filters)))
    captions = [f"{part:.1%}" for part in np.asarray(share)]
    title = "their principal components, with shares of the variance"
    yield (
        "principal_filters",
        figures.filters(np.asarray(principal), captions=captions, columns=8, title=title),
    )
    similarity = np.asarray(patches.position_similarity(model, variables))
    title = "similarity of position embeddings"
    yield "positions", figures.position_similarity(similarity, title=title)


def _title(loaded: LoadedModel, arrays: Any, number: int) -> str:
    if "classes" not in arrays:
        return ""
    word = loaded.class_words[int(arrays["classes"][number])]
    return f"{word}: {float(arrays['probability'][number]):.1%}"


def _contact_sheet(loaded: LoadedModel, seen: Sequence[tuple[Any, Any, str]]) -> Any:
    """The map of the last method of each image."""
    from cait_jax.explain import figures

    maps = [list(arrays["attribution"].values())[-1][0] for _, arrays, _ in seen]
    captions = [_title(loaded, arrays, 0) or name for _, arrays, name in seen]
    return figures.contact_sheet([image for image, _, _ in seen], maps, captions)


def _scores(each: Sequence[Any]) -> str:
    """Mean and standard error over images and classes of both areas, and of their lead over the centre blob."""
    import jax.numpy as jnp

    from cait_jax.explain.faithfulness import Curves, lead, summary

    curves = {
        method: Curves(
            jnp.concatenate([arrays["deletion"][method] for arrays in each]),
            jnp.concatenate([arrays["insertion"][method] for arrays in each]),
        )
        for method in each[0]["deletion"]
    }

    def score(areas: dict[str, float], name: str) -> str:
        error = areas[f"{name}_error"]  # of one image there is none
        return f"{areas[name]:.4f}" + (f" ± {error:.4f}" if math.isfinite(error) else "")

    ahead = lead(curves)  # of all but the centre itself
    rows = []
    for method, areas in summary(curves).items():
        over = ahead.get(method)
        rows.append(
            {
                "method": method,
                "deletion (less is better)": score(areas, "deletion"),
                "insertion (more is better)": score(areas, "insertion"),
                "deletion, lead over centre": score(over, "deletion") if over else "",
                "insertion, lead over centre": score(over, "insertion") if over else "",
            }
        )
    return table(rows)
