"""A network as StableHLO: one program for any batch size and several platforms, and its weights beside it.

`jax.export` writes the program, which JAX reads for six months at least. Weights are arguments, in a file of their
own: constants of a program are compiled with it.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import export as jax_export

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError, one_line
from cait_jax.export import reload
from cait_jax.export.folder import check_export, describe, unfinished, write_description
from cait_jax.export.forward import Exported, to_export
from cait_jax.export.probes import check_difference, difference, make_probes
from cait_jax.reading import check_format, read_json
from cait_jax.weights.state_dicts import read_weights, safetensors_writer

PROGRAM, WEIGHTS = "model.jax_export", "model.safetensors"
PLATFORMS = ("cpu", "cuda", "tpu")


@dataclasses.dataclass(frozen=True)
class PlatformCheck:
    """What became of a reloaded program on a platform.

    Attributes:
      platform: its name.
      difference: from the original, see `probes.difference`; None where it was not run.
      ms_an_image: of a batch of all probes.
      why: it was not run.
    """

    platform: str
    difference: float | None = None
    ms_an_image: float | None = None
    why: str | None = None


@dataclasses.dataclass(frozen=True)
class StableHLOReport:
    """`compared` says on what; `checks` has an entry for each platform; sizes are in bytes."""

    compared: str
    checks: tuple[PlatformCheck, ...]
    program_bytes: int
    weights_bytes: int


def export_stablehlo(
    directory: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *,
    preprocessing: Preprocessing | None = None,
    label_names: Sequence[str] | None = None,
    uint8: bool = False,
    attention: bool = False,
    photographs: Sequence[Path] = (),
) -> StableHLOReport:
    """Writes `model.jax_export`, `model.safetensors` and `export.json`, once a new process has run them.

    The program is of weights by their paths (`params/head/kernel`) and images (batch, height, width, channels); it
    gives a tuple, see `forward.Exported.function`. It has no kernels of a platform.

    Args:
      directory: made if missing.
      model: of this package.
      variables: of the model.
      preprocessing: how its images are made, which is kept in `export.json`.
      label_names: the classes in the order of the logits, which are kept too.
      uint8: take uint8 crops and normalise them in the program.
      attention: give the last attention of the class token too.
      photographs: files on which the result is compared, beside noise.

    Raises:
      UserError: the arguments do not go together, or the reloaded program differs from the model.
    """
    exported = to_export(
        model, variables, preprocessing, uint8=uint8, attention=attention, stacked=True
    )
    check_export(exported, label_names)
    probes = make_probes(exported, photographs)
    with unfinished(Path(directory)) as stage:
        flat = {
            name: np.asarray(array)
            for name, array in flatten_dict(dict(exported.variables), sep="/").items()
        }
        (stage / PROGRAM).write_bytes(program(exported))
        safetensors_writer(flat)(stage / WEIGHTS)
        checks = _run_in_new_process(exported, stage, probes)
        write_description(stage, describe(exported, label_names, platforms=list(PLATFORMS)))
        sizes = [(stage / name).stat().st_size for name in (PROGRAM, WEIGHTS)]
    return StableHLOReport(probes.what, checks, *sizes)


def program(exported: Exported) -> bytes:
    """The function of flat variables and images, serialised by `jax.export` with a symbolic batch."""

    def forward(weights: Any, images: Any) -> Any:
        return exported.function(unflatten_dict(weights, sep="/"), images)

    flat = flatten_dict(dict(exported.variables), sep="/")
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in flat.items()}
    (batch,) = jax_export.symbolic_shape("batch")
    dtype = jnp.uint8 if exported.uint8 else jnp.float32
    images = jax.ShapeDtypeStruct((batch, *exported.image_shape), dtype)
    lowered = jax_export.export(jax.jit(forward), platforms=PLATFORMS)(shapes, images)
    try:
        return bytes(lowered.serialize())
    except ImportError as error:  # flatbuffers
        raise UserError(
            'JAX serialises programs by flatbuffers: pip install "cait-jax[export]"'
        ) from error


def load_exported(directory: str | os.PathLike[str]) -> Callable[[Any], Any]:
    """The function of images in a folder that `export_stablehlo` wrote: a tuple of outputs.

    Raises:
      UserError: there is no such folder, or a newer format in it.
    """
    folder = Path(directory)
    try:
        description = read_json(folder / "export.json")
        data = (folder / PROGRAM).read_bytes()
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is no folder of `cait export --to stablehlo` ({error}): export the model again"
        ) from error
    check_format(folder / "export.json", description.get("format"), 1)
    weights = jax.device_put(read_weights(folder / WEIGHTS))
    call = jax.jit(jax_export.deserialize(bytearray(data)).call)
    return lambda images: call(weights, images)


def _run_in_new_process(exported: Exported, folder: Path, probes: Any) -> tuple[PlatformCheck, ...]:
    with tempfile.TemporaryDirectory() as name:
        given, found = Path(name) / "probes.npz", Path(name) / "found.npz"
        np.savez(given, images=probes.images)
        command = [sys.executable, "-P", str(reload.__file__), str(folder), str(given), str(found)]
        environment = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ}
        ended = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=False
        )
        if ended.returncode or not found.exists():
            reason = one_line((ended.stderr.strip().splitlines() or ["it was killed"])[-1])
            raise UserError(
                f"a new process could not run the exported program ({reason}), so nothing was written"
            )
        with np.load(found) as file:
            results = dict(file)
    return tuple(_judged(exported, probes, platform, results) for platform in PLATFORMS)


def _judged(
    exported: Exported, probes: Any, platform: str, results: Mapping[str, Any]
) -> PlatformCheck:
    if f"{platform}/why" in results:
        return PlatformCheck(platform, why=str(results[f"{platform}/why"]))
    worst = 0.0
    for name, rows in (("one", slice(0, 1)), ("all", slice(None))):
        outputs = {
            output: results[f"{platform}/{name}/{number}"]
            for number, output in enumerate(exported.output_names)
        }
        worst = max(worst, difference(outputs, probes.outputs, rows))
    check_difference(exported, worst, f"a new process on {platform}")
    seconds = float(results[f"{platform}/seconds"]) / len(probes.images)
    return PlatformCheck(platform, worst, seconds * 1e3)
