"""`cait export`: a network for programs without this package."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_names_option, with_class_names
from cait_jax.cli.common import LoadedModel, dtype_option, model_options
from cait_jax.cli.output import echo, note

FORMATS = ("stablehlo",)


@click.command(
    "export",
    short_help="A model as StableHLO, for programs without this package.",
    epilog="Example: cait export --model cait_xxs24_224 --to stablehlo exported/ --images photographs/",
)
@model_options
@dtype_option
@class_names_option
@click.option("--to", "form", type=click.Choice(FORMATS), required=True, help="What is written.")
@click.option(
    "--uint8", is_flag=True,
    help="Take uint8 images, resized and cropped, and normalise them in the graph.",
)  # fmt: skip
@click.option(
    "--attention", is_flag=True,
    help="Give what the class token reads from each patch too: of the last layer, mean over heads.",
)  # fmt: skip
@click.option(
    "--images", multiple=True, metavar="IMAGE",
    help="A photograph, a folder or a glob in quotes on which the result is compared with the model; the first 16 "
    "count.  [default: drawn pictures]",
)  # fmt: skip
@click.argument("target", type=click.Path(path_type=Path, file_okay=False))
def command(
    load: Any,
    dtype_policy: dict[str, Any],
    model_name: str,
    class_names: Path | None,
    form: str,
    uint8: bool,
    attention: bool,
    images: tuple[str, ...],
    target: Path,
) -> None:
    """Write a model to the directory TARGET in a form that needs neither this package nor Flax.

    Class names and preprocessing travel along in export.json. The files are put in place when they were loaded
    again in a new process and gave what the model gives, on noise and on photographs.

    --to stablehlo: a program of jax.export for CPU, CUDA and TPU and any batch size, and its weights.
    """
    from cait_jax.explain.attention import check_class_token
    from cait_jax.files import check_folder

    check_folder(target, parents=True)
    photographs = _photographs(images)
    loaded = with_class_names(load(**dtype_policy), class_names)
    if attention:
        check_class_token(loaded.model, model_name, "leave out --attention")
    options = {
        "preprocessing": loaded.preprocessing,
        "label_names": loaded.label_names if loaded.model.num_classes else None,
        "uint8": uint8,
        "attention": attention,
        "photographs": photographs,
    }
    _to_stablehlo(loaded, model_name, target, options)


def _photographs(images: tuple[str, ...]) -> list[Path]:
    from cait_jax.data.image_files import find_images, left_out_in_words

    if not images:
        return []
    found = find_images(images)
    if left_out := left_out_in_words(found.left_out, " ".join(images)):
        note(left_out)
    return list(found.paths)


def _to_stablehlo(loaded: LoadedModel, name: str, target: Path, options: dict[str, Any]) -> None:
    from cait_jax.export.stablehlo import PROGRAM, WEIGHTS, export_stablehlo

    report = export_stablehlo(target, loaded.model, loaded.variables, **options)
    echo(
        f"{name} is in {target}: {PROGRAM} ({report.program_bytes / 1e6:.1f} MB), "
        f"{WEIGHTS} ({report.weights_bytes / 1e6:.1f} MB), export.json"
    )
    echo(f"compared in a new process on {report.compared}:")
    for check in report.checks:
        if check.difference is None:
            echo(f"  {check.platform}: not run ({check.why})")
        else:
            echo(
                f"  {check.platform}: differs by at most {check.difference:.1e} of the largest output, "
                f"{check.ms_an_image:.1f} ms an image"
            )
    echo(
        f"load it by cait_jax.export.stablehlo.load_exported({str(target)!r}), or by JAX alone: docs/export.md"
    )
