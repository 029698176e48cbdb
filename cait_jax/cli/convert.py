"""`cait convert`: weights from one form to another."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli.loading import model_options


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
@click.argument("directory", type=click.Path(path_type=Path, file_okay=False))
def command(load: Any, model_name: str, form: str, directory: Path) -> None:
    """Write a model to DIRECTORY: model.safetensors, config.json and, for timm, a model card.

    The model may be a released one, a file of weights (with --model NAME --weights FILE), a saved directory or
    a training run. Parameters are written bit for bit, in the dtype they have.
    """
    from cait_jax.weights.export import export_timm
    from cait_jax.weights.saved import save_pretrained

    loaded = load()
    write = export_timm if form == "timm" else save_pretrained
    write(
        directory,
        loaded.model,
        loaded.variables,
        label_names=loaded.label_names,
        preprocessing=loaded.preprocessing.to_dict(),
    )
    click.echo(f"{model_name} is in {directory}; {_next_step(form, directory)}")


def _next_step(form: str, directory: Path) -> str:
    if form == "cait":
        return f"load it by cait_jax.load_pretrained({str(directory)!r})"
    return "its README.md says how timm loads it"
