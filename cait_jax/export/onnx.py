"""A network as an ONNX file with a batch of any size, by jax2onnx, compared in onnxruntime."""

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError, one_line
from cait_jax.export.environment import environment_python, run
from cait_jax.export.folder import check_export, describe, unfinished, write_description
from cait_jax.export.forward import Exported, to_export
from cait_jax.export.probes import Probes, check_difference, difference, make_probes
from cait_jax.models.inspect import parameter_count
from cait_jax.weights.saved import save_pretrained

MODEL, INT8 = "model.onnx", "model_int8.onnx"
OPSET = 18  # onnxruntime 1.14, of 2023, and later
MOST_BYTES = 2**31 - 2**26  # protobuf's bound, less what the graph may take


@dataclasses.dataclass(frozen=True)
class FileCheck:
    """What onnxruntime makes of a file.

    Attributes:
      name: of the file.
      bytes: its size, with that of its weights where they are beside it.
      difference: from the original, see `probes.difference`.
      agreement: the fraction of images with the same most probable class; None without a head.
      ms_an_image: of a batch of all probes on the CPU.
    """

    name: str
    bytes: int
    difference: float
    agreement: float | None
    ms_an_image: float


@dataclasses.dataclass(frozen=True)
class ONNXReport:
    """`compared` says on what; `files` has an entry for each file."""

    compared: str
    files: tuple[FileCheck, ...]


def export_onnx(
    directory: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *,
    environment: str | os.PathLike[str] | None,
    install: bool = False,
    preprocessing: Preprocessing | None = None,
    label_names: Sequence[str] | None = None,
    uint8: bool = False,
    attention: bool = False,
    int8: bool = False,
    photographs: Sequence[Path] = (),
) -> ONNXReport:
    """Writes `model.onnx` and `export.json`, once onnxruntime gives what the model gives.

    Weights of more than 2 GB are beside it in `model.onnx.data`. The graph is of opset 18. Its input `images` and
    outputs are those of `forward.Exported`.

    Args:
      directory: made if missing.
      model: of this package, computing in float32.
      variables: of the model.
      environment: a directory with a Python environment that has `environment.requirements`.
      install: make it by venv and pip where it does not exist.
      preprocessing: how its images are made, which is kept in `export.json`.
      label_names: the classes in the order of the logits, which are kept too.
      uint8: take uint8 crops and normalise them in the graph.
      attention: give the last attention of the class token too.
      int8: write `model_int8.onnx` too, by onnxruntime's dynamic quantisation.
      photographs: files on which the result is compared, beside noise.

    Raises:
      UserError: the arguments do not go together, there is no such environment, or the outputs differ.
    """
    check_onnx(model)
    exported = to_export(
        model, variables, preprocessing, uint8=uint8, attention=attention, stacked=False
    )
    check_export(exported, label_names)
    python = environment_python(None if environment is None else Path(environment), install=install)
    with unfinished(Path(directory)) as stage:
        checks, compared = write_onnx(exported, python, stage, photographs, int8=int8)
        more = {"opset": OPSET, "files": sorted(file.name for file in stage.iterdir())}
        write_description(stage, describe(exported, label_names, **more))
    return ONNXReport(compared, checks)


def check_onnx(model: Any) -> None:
    """Refuses a model that is not float32.

    Raises:
      UserError: naming what it is.
    """
    if jnp.dtype(model.dtype) != jnp.float32 or jnp.dtype(model.param_dtype) != jnp.float32:
        raise UserError(
            f"ONNX is written in float32, and this model is {jnp.dtype(model.dtype).name} with parameters in "
            f"{jnp.dtype(model.param_dtype).name}: load it in float32"
        )


def fits_one_file(model: Any) -> bool:
    """Whether a model's weights can be in the file of its graph."""
    return 4 * parameter_count(model) <= MOST_BYTES


def write_onnx(
    exported: Exported, python: Path, folder: Path, photographs: Sequence[Path], *, int8: bool
) -> tuple[tuple[FileCheck, ...], str]:
    """Converts, runs and compares; the files are in `folder` then.

    Returns:
      The checks of each file, and on what they were made.

    Raises:
      UserError: the conversion failed, or an output in float32 differs.
    """
    probes = make_probes(exported, photographs)
    with _converted(exported, python, probes, int8=int8) as work:
        with np.load(work / "found.npz") as file:
            results = dict(file)
        checks = []
        for name in (MODEL, INT8) if int8 else (MODEL,):
            checks.append(_judged(exported, probes, work / name, results))
            if name == MODEL:
                check_difference(exported, checks[0].difference, "onnxruntime")
            for file in _parts(work / name):
                shutil.move(file, folder)
    return tuple(checks), probes.what


@contextmanager
def _converted(exported: Exported, python: Path, probes: Probes, *, int8: bool) -> Iterator[Path]:
    options = {
        "uint8": exported.uint8, "attention": exported.attention, "int8": int8, "opset": OPSET,
        "external": not fits_one_file(exported.model),
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        save_pretrained(
            work / "saved", exported.model, exported.variables, preprocessing=exported.preprocessing
        )
        (work / "options.json").write_text(json.dumps(options), encoding="utf-8")
        np.savez(work / "probes.npz", images=probes.images)
        ended = run(python, [Path(__file__).with_name("to_onnx.py"), work])
        if ended.returncode:
            reason = one_line((ended.stderr.strip().splitlines() or ["it was killed"])[-1])
            raise UserError(
                f"jax2onnx could not write the model ({reason}), so nothing was written"
            )
        yield work


def _judged(
    exported: Exported, probes: Probes, file: Path, results: Mapping[str, Any]
) -> FileCheck:
    names, worst = exported.output_names, 0.0
    for rows, part in (("one", slice(0, 1)), ("all", slice(None))):
        found = {
            output: results[f"{file.name}/{rows}/{number}"] for number, output in enumerate(names)
        }
        worst = max(worst, difference(found, probes.outputs, part))
    agreement = None
    if exported.model.num_classes:
        same = found["logits"].argmax(-1) == probes.outputs["logits"].argmax(-1)
        agreement = float(same.mean())
    seconds = float(results[f"{file.name}/seconds"]) / len(probes.images)
    size = sum(part.stat().st_size for part in _parts(file))
    return FileCheck(file.name, size, worst, agreement, seconds * 1e3)


def _parts(file: Path) -> list[Path]:
    """A file of ONNX, and its weights if they are beside it."""
    return [part for part in (file, file.with_name(f"{file.name}.data")) if part.exists()]
