"""`cait models`: the table of the zoo."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli import output


@click.command(
    "models",
    short_help="The named models: size, cost, resolution, accuracy, weights.",
    epilog="Example: cait models 'cait_s*' --pretrained",
)
@click.argument("pattern", default="*")
@click.option("--pretrained", is_flag=True, help="Only those with released weights.")
@click.option("--json", "json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option(
    "--pin", metavar="FILE", type=click.Path(path_type=Path, dir_okay=False),
    help="Write commits and checksums of their released weights, from the hub, to FILE; CAIT_PINS=FILE uses them.",
)  # fmt: skip
def command(pattern: str, pretrained: bool, json: bool, markdown: bool, pin: Path | None) -> None:
    """List the named models that match the shell PATTERN, all of them by default.

    Parameters and multiply-accumulates (GMACs, for one image) are computed from the shapes. Top-1 is the
    published accuracy on ImageNet-1k's validation images, in percent; its source stands beside it.
    """
    from cait_jax.errors import UserError
    from cait_jax.weights.pretrained import list_models

    output.check_writable(pin)
    names = list_models(pattern, pretrained=pretrained or pin is not None)
    if not names:
        raise UserError(f"no model matches {pattern!r}: `cait models` lists them all")
    if pin is not None:
        from cait_jax.weights.hub import pins_of
        from cait_jax.weights.pins import write_pins

        write_pins(pin, pins_of(names))
        output.echo(f"{pin}: pins of {len(names)} released models")
        return
    rows = [_row(name) for name in names]
    if json:
        click.echo(output.as_json(rows))
        return
    shown = [
        {
            "name": f"`{row['name']}`" if markdown else row["name"],
            "parameters": f"{row['parameters']:,}",
            "GMACs": f"{row['gmacs']:.2f}" if row["gmacs"] >= 0.1 else f"{row['gmacs']:.4f}",
            "pixels": f"{row['image_size'][0]}",
            "top-1": None if row["top1"] is None else f"{row['top1']:.1f}",
            "source of top-1": row["top1_source"],
            "weights": row["weights"],
        }
        for row in rows
    ]
    click.echo(output.table(shown, markdown=markdown))


def _row(name: str) -> dict[str, Any]:
    from cait_jax.models.inspect import macs, parameter_count
    from cait_jax.models.zoo import create_model
    from cait_jax.weights.hub import RELEASED, published_result

    model = create_model(name)
    result = published_result(name)
    return {
        "name": name,
        "parameters": parameter_count(model),
        "gmacs": macs(model) / 1e9,
        "image_size": list(model.image_size),
        "top1": result and result.top1,
        "top1_source": result and result.source,
        "weights": RELEASED[name].hub_id if name in RELEASED else None,
    }
