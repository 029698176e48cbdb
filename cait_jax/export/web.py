"""A folder for any static web server: a page that classifies pictures in the browser, by onnxruntime-web."""

import importlib.resources
import os
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import Literal, UserError, one_line, setting
from cait_jax.export.environment import environment_python
from cait_jax.export.folder import check_export, describe, unfinished, write_description
from cait_jax.export.forward import to_export
from cait_jax.export.onnx import (
    INT8,
    MODEL,
    MOST_BYTES,
    OPSET,
    ONNXReport,
    check_onnx,
    fits_one_file,
    write_onnx,
)
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import parameter_count

PAGE = ("index.html", "page.css", "page.js", "resize.js")
RUNTIME = "onnxruntime-web@1.30.0"
_RUNTIME_FILES = ("ort.wasm.min.js", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")


def export_web(
    directory: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *,
    name: str,
    environment: str | os.PathLike[str] | None,
    install: bool = False,
    runtime: str | os.PathLike[str] | None = None,
    download_runtime: bool = False,
    preprocessing: Preprocessing | None = None,
    label_names: Sequence[str] | None = None,
    int8: bool = False,
    photographs: Sequence[Path] = (),
) -> ONNXReport:
    """Writes the page, the network as ONNX, `export.json`, and onnxruntime-web in `ort/`.

    The graph takes uint8 crops and gives, of networks with a class token, its last attention too.

    Args:
      directory: made if missing.
      model: a classifier of this package, computing in float32.
      variables: of the model.
      name: as the page shows it.
      environment: see `export_onnx`.
      install: see `export_onnx`.
      runtime: a folder with the npm package onnxruntime-web, or its `dist`.
      download_runtime: have npm download it.
      preprocessing: how its images are made, which the page does alike.
      label_names: the classes in the order of the logits.
      int8: let the page have the network in int8.
      photographs: see `export_onnx`.

    Raises:
      UserError: the arguments do not go together, something is missing, or the outputs differ.
    """
    check_onnx(model)
    check_web(model, preprocessing)
    attention = isinstance(model, CaiT) and model.class_token != "mean"
    exported = to_export(
        model, variables, preprocessing, uint8=True, attention=attention, stacked=False
    )
    check_export(exported, label_names)
    with runtime_files(
        None if runtime is None else Path(runtime), download=download_runtime
    ) as ort:
        python = environment_python(
            None if environment is None else Path(environment), install=install
        )
        with unfinished(Path(directory)) as stage:
            checks, compared = write_onnx(exported, python, stage, photographs, int8=int8)
            if int8:
                (stage / MODEL).unlink()
            more = {"name": name, "opset": OPSET, "files": [INT8 if int8 else MODEL]}
            write_description(stage, describe(exported, label_names, **more))
            pages = importlib.resources.files("cait_jax.export") / "page"
            for file in PAGE:
                (stage / file).write_bytes((pages / file).read_bytes())
            (Path(directory) / "ort").mkdir(parents=True, exist_ok=True)
            for path in ort:
                shutil.copyfile(path, Path(directory) / "ort" / path.name)
    return ONNXReport(compared, checks)


def check_web(model: Any, preprocessing: Preprocessing | None) -> None:
    """Refuses what the page cannot show.

    Raises:
      UserError: the model is too large, has no head, or its preprocessing is not known.
    """
    if not fits_one_file(model):
        raise UserError(
            f"this model has {4e-9 * parameter_count(model):.1f} GB of weights, and a page loads at most "
            f"{MOST_BYTES / 1e9:.1f}: choose a smaller one"
        )
    if not model.num_classes:
        raise UserError(
            "this model has no head, so a page has no classes to show: choose a classifier"
        )
    if preprocessing is None:
        raise UserError(
            "the page needs the model's preprocessing, which is not known: save it with the model"
        )


@contextmanager
def runtime_files(directory: Path | None, *, download: bool) -> Iterator[tuple[Path, ...]]:
    """The files of onnxruntime-web that the page loads, in `directory` or downloaded by npm.

    Raises:
      UserError: neither is given, a file is missing, or npm failed.
    """
    given, fetch = setting("runtime", Literal("DIR")), setting("download_runtime", True)
    if directory is None and not download:
        raise UserError(
            f"the page needs the npm package onnxruntime-web: give {given}, a folder that has it, or {fetch}"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = directory if directory is not None else _download(Path(name))
        dist = folder / "dist" if (folder / "dist").is_dir() else folder
        files = tuple(dist / file for file in _RUNTIME_FILES)
        if missing := [file.name for file in files if not file.is_file()]:
            raise UserError(
                f"{folder} is not the npm package onnxruntime-web, for it has no {missing[0]}: give another "
                f"{setting('runtime')}, or {fetch}"
            )
        yield files


def _download(folder: Path) -> Path:
    instead = f"give {setting('runtime', Literal('DIR'))} with the package {RUNTIME}"
    if (npm := shutil.which("npm")) is None:
        raise UserError(f"there is no npm here to download {RUNTIME}: install it, or {instead}")
    command = [npm, "pack", RUNTIME, "--silent", "--pack-destination", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(folder.glob("*.tgz"))
    if ended.returncode or not archives:
        lines = [line for line in ended.stderr.strip().splitlines() if "A complete log" not in line]
        reason = one_line(lines[-1] if lines else "it ended without a word")
        raise UserError(f"npm could not download {RUNTIME} ({reason}): try again, or {instead}")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    return folder / "package"
