"""`cait convert`: weights from one form to another."""

import itertools
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import model_options
from cait_jax.cli.output import echo
from cait_jax.files import check_folder


@click.command(
    "convert",
    short_help="Weights and checkpoints to a directory for cait_jax or for timm.",
    epilog="Example: cait convert --model runs/digits --to timm exported/",
)
@model_options
@click.option(
    "--to", "form", type=click.Choice(["cait", "timm"]), default="cait", show_default=True,
    help="Who is to read it: cait_jax.load_pretrained, or timm.create_model (PyTorch).",
)  # fmt: skip
@click.option(
    "--average", multiple=True, metavar="NAME|DIR",
    help="Average the parameters with those of this model too, such as an earlier checkpoint of the run "
    "(RUN/checkpoints/STEP); may be given several times.",
)  # fmt: skip
@click.argument("target", type=click.Path(path_type=Path))
@click.pass_context
def command(
    ctx: click.Context,
    load: Any,
    model_name: str,
    form: str,
    average: tuple[str, ...],
    target: Path,
) -> None:
    """Write a model to the directory TARGET: model.safetensors, config.json and, for timm, a model card.

    With --to timm, TARGET may also be a .safetensors file, which is then written alone.

    The model may be a released one, a file of weights (with --model NAME --weights FILE), a saved directory or
    a training run. Parameters are written bit for bit, in the dtype they have.
    """
    from cait_jax.errors import UserError
    from cait_jax.weights.adapt import mean_params
    from cait_jax.weights.pretrained import load_pretrained
    from cait_jax.weights.saved import save_pretrained
    from cait_jax.weights.timm_export import export_timm

    alone = target.suffix == ".safetensors"
    if alone and form == "cait":
        raise UserError(
            f"{target.name} alone would not say which network it is of: name a directory, or add --to timm"
        )
    check_folder(target.parent if alone else target, parents=True)
    loaded = load()
    variables = loaded.variables
    if average:
        alike = {key: ctx.params[key] for key in ("image_size", "antialias", "ema")}
        others = (load_pretrained(other, **alike)[1] for other in average)
        variables = mean_params(itertools.chain([variables], others))
    write = export_timm if form == "timm" else save_pretrained
    write(
        target,
        loaded.model,
        variables,
        label_names=loaded.label_names,
        preprocessing=loaded.preprocessing,
    )
    if form == "cait":
        then = f"load it by cait_jax.load_pretrained({str(target)!r})"
    elif alone:
        then = f"timm loads it with checkpoint_path={str(target)!r}"
    else:
        then = "its README.md says how timm loads it"
    echo(f"{model_name} is in {target}; {then}")
