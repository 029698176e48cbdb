"""`cait export`: a network for programs without this package."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_names_option, with_class_names
from cait_jax.cli.common import LoadedModel, dtype_option, model_options
from cait_jax.cli.output import echo, note

FORMATS = ("stablehlo", "onnx", "web")


@click.command(
    "export",
    short_help="A model as StableHLO, ONNX or a web page, for programs without this package.",
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
@click.option(
    "--environment", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Of --to onnx and web: the Python environment of jax2onnx, which asks for another Orbax.",
)  # fmt: skip
@click.option(
    "--install", is_flag=True,
    help="Make that environment by venv and pip if there is none (about 1 GB).",
)  # fmt: skip
@click.option(
    "--int8", is_flag=True,
    help="Of --to onnx and web: linear layers in int8, in model_int8.onnx.",
)  # fmt: skip
@click.option(
    "--runtime", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Of --to web: a folder with the npm package onnxruntime-web.",
)  # fmt: skip
@click.option("--download-runtime", is_flag=True, help="Of --to web: have npm download it (33 MB).")
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
    environment: Path | None,
    install: bool,
    int8: bool,
    runtime: Path | None,
    download_runtime: bool,
    target: Path,
) -> None:
    """Write a model to the directory TARGET in a form that needs neither this package nor Flax.

    Class names and preprocessing travel along in export.json. The files are put in place when they were loaded
    again in a new process and gave what the model gives, on noise and on photographs.

    --to stablehlo: a program of jax.export for CPU, CUDA and TPU and any batch size, and its weights.

    --to onnx: a graph for onnxruntime and others, with a batch of any size, in float32.

    --to web: a page that classifies pictures in the browser and draws the class token's attention, to be
    served by any static server.
    """
    from cait_jax.errors import UserError
    from cait_jax.explain.attention import check_class_token
    from cait_jax.files import check_folder

    given = {
        "--environment": (environment, ("onnx", "web")), "--install": (install, ("onnx", "web")),
        "--int8": (int8, ("onnx", "web")), "--runtime": (runtime, ("web",)),
        "--download-runtime": (download_runtime, ("web",)), "--uint8": (uint8, ("stablehlo", "onnx")),
        "--attention": (attention, ("stablehlo", "onnx")),
    }  # fmt: skip
    for option, (value, forms) in given.items():
        if value and form not in forms:
            raise UserError(f"{option} goes with --to {' and '.join(forms)}: leave it out")
    if form != "stablehlo" and dtype_policy["dtype"] != "float32":
        raise UserError(
            f"--to {form} computes in float32: leave out --dtype {dtype_policy['dtype']}"
        )
    check_folder(target, parents=True)
    if form != "stablehlo":
        from cait_jax.export.environment import environment_python

        environment_python(environment, install=install)
    if form == "web":
        from cait_jax.export.web import runtime_files

        if not download_runtime:
            with runtime_files(runtime, download=False):
                pass
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
    if form == "stablehlo":
        _to_stablehlo(loaded, model_name, target, options)
        return
    options |= {"environment": environment, "int8": int8}
    if form == "onnx":
        _to_onnx(loaded, model_name, target, options)
        return
    del options["uint8"], options["attention"]
    options |= {"runtime": runtime, "download_runtime": download_runtime}
    _to_web(loaded, model_name, target, options)


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
        f"{name} is in {target}: {PROGRAM} ({report.program_bytes / 1e3:.0f} kB), "
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


def _to_onnx(loaded: LoadedModel, name: str, target: Path, options: dict[str, Any]) -> None:
    from cait_jax.export.onnx import export_onnx

    _tell(name, target, export_onnx(target, loaded.model, loaded.variables, **options))


def _to_web(loaded: LoadedModel, name: str, target: Path, options: dict[str, Any]) -> None:
    from cait_jax.export.web import export_web

    shown = Path(name).name
    report = export_web(target, loaded.model, loaded.variables, name=shown, **options)
    _tell(name, target, report)
    echo(f"serve it, for example by `python -m http.server --directory {target}`")


def _tell(name: str, target: Path, report: Any) -> None:
    from cait_jax.export.onnx import OPSET

    echo(f"{name} is in {target}, in opset {OPSET}; compared in onnxruntime on {report.compared}:")
    for file in report.files:
        same = "" if file.agreement is None else f", the same class for {file.agreement:.0%}"
        echo(
            f"  {file.name} ({file.bytes / 1e6:.1f} MB): differs by at most {file.difference:.1e} of the largest "
            f"output{same}, {file.ms_an_image:.1f} ms an image"
        )
