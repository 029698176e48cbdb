"""`cait recipes`: the recipes in `configs/`, the accuracy to expect of each, and what was run here."""

import dataclasses
import fnmatch
from typing import Any

import click

_LARGER = "CaiT paper, of the larger cait_m36, distilled"
_REVENGE = "facebookresearch/deit, README_revenge.md"
# DeiT III; None: of the part of the training at 192 pixels alone.
_DEIT3 = {
    "small": 81.4,
    "base": None,
    "large": None,
    "base,224": 83.8,
    "large,224": 84.9,
    "small,384": 83.4,
    "base,384": 85.0,
    "large,384": 85.8,
}
# Fine-tuned at 384 pixels, without distillation (CaiT paper, arXiv 2103.17239).
_CAIT_AT_384 = {
    "cait_xxs24": 80.4,
    "cait_xxs36": 81.8,
    "cait_xs24": 83.8,
    "cait_xs36": 84.3,
    "cait_s24": 84.3,
    "cait_s36": 84.8,
    "cait_s48": 85.1,
    "cait_m24": 84.5,
    "cait_m36": 84.9,
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A recipe: its file in `configs/` with its argument, and the accuracy to expect, in percent."""

    recipe: str
    data: str
    top1: float | None = None
    source: str | None = None
    run_here: str | None = None  # result, hardware and time of a run to its end; None: no such run


def recipes() -> list[Recipe]:
    """Every recipe."""
    cait = [row for name in (*_CAIT_AT_384, "cait_m48") for row in _cait(name)]
    deit = [
        _imagenet(
            f"deit.py:{size}{',' * bool(variant)}{variant}",
            f"deit_{size}{'_' * bool(variant)}{variant}",
        )
        for variant in ("", "distilled")
        for size in ("tiny", "small", "base")
    ]
    return [
        Recipe(
            "digits.py", "scikit-learn's digits",
            run_here="99.44 %, mean of seeds 0, 1, 2; half a minute each on 2 CPU cores, 2026-11-26",
        ),
        Recipe("folder.py:DIR", "a folder of photographs"),
        *cait,
        *deit,
        Recipe("deit.py:base,384", "imagenet2012", 82.9, "facebookresearch/deit, README_deit.md"),
        *(
            Recipe(f"deit3.py:{argument}", "imagenet2012", top1, _REVENGE if top1 else None)
            for argument, top1 in _DEIT3.items()
        ),
        Recipe("transfer.py:cars", "cars196", 94.2, _LARGER),
        Recipe("transfer.py:cifar10", "cifar10", 99.4, _LARGER),
        Recipe("transfer.py:cifar100", "cifar100", 93.1, _LARGER),
        Recipe("transfer.py:flowers", "oxford_flowers102", 99.1, _LARGER),
        Recipe("transfer.py:inaturalist", "i_naturalist2018"),
        Recipe("cifar10.py", "cifar10", 95.8, "an aim; a published CaiT of as many passes has 94.9"),
        Recipe(
            "cifar10.py:hour", "cifar10",
            run_here="86.33 %, seed 0; 60 minutes with the next on 2 CPU cores as two devices, 2026-11-28",
        ),
        Recipe("cifar10.py:hour,patch8", "cifar10"),
        Recipe(
            "cifar10.py:small", "cifar10",
            run_here="76.23 %, seed 0; 55 minutes on 2 CPU cores as two devices, 2026-11-21",
        ),
        Recipe(
            "cifar10.py:finetune", "cifar10", 96.42,
            "arXiv 2210.07240, after dino.py:cifar10; 94.91 from scratch",
        ),
        Recipe("dino.py:cifar10", "cifar10"),
        Recipe("dino.py:imagenet", "imagenet2012"),
        Recipe("dino.py:small", "cifar10"),
        Recipe("vit_cifar10.py", "cifar10", 92.0, "an aim, of 92 to 94"),
        Recipe("mae.py:cifar10", "cifar10"),
        Recipe("mae.py:imagenet", "imagenet2012"),
        Recipe("mae.py:small", "cifar10"),
    ]  # fmt: skip


def _cait(name: str) -> list[Recipe]:
    pixels = 448 if name == "cait_m48" else 384
    paper = "CaiT paper, without distillation" if name in _CAIT_AT_384 else None
    return [
        _imagenet(f"{name}.py", name),
        Recipe(f"{name}.py:{pixels}", "imagenet2012", _CAIT_AT_384.get(name), paper),
        _imagenet(f"{name}.py:distilled", f"{name}_224"),
        _imagenet(f"{name}.py:{pixels},distilled", f"{name}_{pixels}"),
    ]


def _imagenet(config: str, model: str) -> Recipe:
    from cait_jax.weights.hub import RELEASED, published_result

    result = published_result(model)
    if result is None:
        return Recipe(config, "imagenet2012")
    of = f" of the released {model}" if model in RELEASED else ""
    return Recipe(config, "imagenet2012", result.top1, result.source + of)


@click.command(
    "recipes",
    short_help="The recipes of train.py: data, accuracy to expect, what was run; their keys.",
    epilog="Example: cait recipes 'cait_s24*', or cait recipes --keys 'optimizer.*'",
)
@click.argument("pattern", default="*")
@click.option(
    "--keys", is_flag=True, help="List the keys of a recipe that match the PATTERN instead."
)
@click.option("--json", "json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
def command(pattern: str, keys: bool, json: bool, markdown: bool) -> None:
    """List the recipes that match the shell PATTERN, all of them by default.

    In the repository, `python train.py --config=configs/RECIPE` trains by one; data other than the digits and
    folders are TFDS's and need `--config.data.data_dir=DIR`. Top-1 is the accuracy to expect, in percent, with its
    source. The CaiT paper reports the raw parameters (eval/accuracy), not their average (eval/ema_accuracy).
    """
    from cait_jax.cli import output
    from cait_jax.errors import UserError
    from cait_jax.train.keys import key_rows

    name = "key" if keys else "recipe"
    rows = key_rows() if keys else [dataclasses.asdict(row) for row in recipes()]
    rows = [row for row in rows if fnmatch.fnmatch(row[name], pattern)]
    if not rows:
        option = " --keys" * keys
        raise UserError(f"no {name} matches {pattern!r}: `cait recipes{option}` lists them all")
    if json:
        click.echo(output.as_json(rows))
        return
    shown = [row if keys else _shown(row) for row in rows]
    if markdown:
        shown = [row | {name: f"`{row[name]}`"} for row in shown]
    click.echo(output.table(shown, markdown=markdown))


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    top1 = None if row["top1"] is None else f"{row['top1']:.1f}"
    return {
        "recipe": row["recipe"],
        "data": row["data"],
        "top-1": top1,
        "source of top-1": row["source"],
        "run here": row["run_here"],
    }
