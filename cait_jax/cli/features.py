"""`cait features`: a layer's outputs in an npz file."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import (
    dtype_option,
    exit_if_left_out,
    image_options,
    model_options,
    run_over_images,
)
from cait_jax.cli.output import check_writable, echo


@click.command(
    "features",
    short_help="Features of photographs from any layer, to an npz file.",
    epilog="Example: cait features photos/ --model cait_xs24_384 --layer blocks.11 --tokens -o f.npz",
)
@image_options
@model_options
@dtype_option
@click.option(
    "--layer", default="head", show_default=True,
    help="'head': what the head reads; 'blocks.N' or 'blocks_token_only.N': after block N, counted from 0; "
    "'stages.N' of RegNetY.",
)  # fmt: skip
@click.option("--tokens", is_flag=True, help="All tokens of the layer instead of their mean.")
@click.option(
    "--output", "-o", required=True, metavar="FILE.npz",
    type=click.Path(path_type=Path, dir_okay=False), help="The file to write.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    paths: list[Path],
    load: Any,
    dtype_policy: dict[str, Any],
    model_name: str,
    layer: str,
    tokens: bool,
    batch_size: int,
    output: Path,
) -> None:
    """Write the features of each IMAGE to FILE.npz.

    The file holds `features`, float32 (images, width) or, with --tokens, (images, tokens, width), and `paths`,
    the images in the same order. Images that cannot be read are left out, and the exit status is then 1.
    """
    import numpy as np

    from cait_jax.errors import UserError
    from cait_jax.weights.state_dicts import replace_files

    check_writable(output, suffix=".npz")
    loaded = load(**dtype_policy, num_classes=0)  # weights may have a head or none
    function = layer_features(loaded.model, layer, tokens=tokens)
    found, features, broken = [], [], 0
    for answers in run_over_images(
        loaded, function, paths, batch_size=batch_size, title=model_name
    ):
        broken += len(answers.broken)
        if answers.outputs is not None:
            found += [str(path) for path in answers.paths]
            features.append(answers.outputs)
    if not features:
        raise UserError(f"none of the {len(paths)} images could be read, so nothing was written")
    whole = np.concatenate(features)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            np.savez(file, features=whole, paths=np.array(found))

    replace_files(output.absolute().parent, {output.name: write})
    echo(f"{output}: features {whole.dtype} {whole.shape} of {len(found)} images")
    exit_if_left_out(ctx, broken, len(paths))


def layer_features(model: Any, layer: str, *, tokens: bool) -> Any:
    """The function from variables and images to a layer's features.

    Args:
      model: the network.
      layer: `"head"`, or a key of `forward_intermediates` and a number, such as `"blocks.3"`.
      tokens: (batch, tokens, d) instead of their mean, (batch, d).

    Raises:
      UserError: the model has no such layer; naming those it has.
    """
    import jax
    import jax.numpy as jnp

    from cait_jax.errors import UserError
    from cait_jax.models.inspect import abstract_variables, forward_intermediates

    stage, _, number = layer.partition(".")
    image = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
    _, inside = jax.eval_shape(
        lambda variables, images: forward_intermediates(model, variables, images),
        abstract_variables(model),
        image,
    )
    depths = {key: _depth(inside[key]) for key in ("blocks", "blocks_token_only", "stages")
              if key in inside}  # fmt: skip
    known = layer == "head" or (stage in depths and number in map(str, range(depths[stage])))
    if not known:
        ranges = [f"{key}.0 to {key}.{depth - 1}" for key, depth in depths.items()]
        raise UserError(
            f"there is no layer {layer[:80]!r}; there are {', '.join(['head', *ranges])}"
        )
    if layer == "head" and tokens:
        raise UserError(
            "the head reads one vector, no tokens: name a block, as in --layer blocks.0"
        )

    def function(variables: Any, images: Any) -> Any:
        _, inside = forward_intermediates(model, variables, images)
        if layer == "head":
            return inside["features"].astype(jnp.float32)
        part, index = inside[stage], int(number)
        at = part["features"][index] if isinstance(part, dict) else part[index]
        at = at["features"] if isinstance(at, dict) else at
        at = at.reshape(at.shape[0], -1, at.shape[-1]).astype(jnp.float32)
        return at if tokens else at.mean(axis=1)

    return function


def _depth(part: Any) -> int:
    return part["features"].shape[0] if isinstance(part, dict) else len(part)
