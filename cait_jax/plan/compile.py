"""A step traced from shapes, AOT-compiled for a topology, cached on disk; the largest batch that fits."""

import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.errors import UserError
from cait_jax.plan import gpu
from cait_jax.plan.roofline import Topology
from cait_jax.sharding import batch_sharding
from cait_jax.train.setup import Trainer

_NEEDED = re.compile(r"\(?(\d+(?:\.\d+)?)([KMGT])\)?")
# v5p and v6e gather and scatter on SparseCores, and libtpu 0.0.52 fails to print a program that does.
_WITHOUT_SPARSE_CORES: dict[str, str | bool] = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def abstract_batch(trainer: Trainer) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch."""
    count, model = trainer.config.batch_size, trainer.model
    struct = functools.partial(jax.ShapeDtypeStruct, sharding=batch_sharding(trainer.mesh))
    batch = {
        "image": struct((count, *model.image_size, model.in_channels), jnp.uint8),
        "label": struct((count,), jnp.int32),
    }
    if trainer.config.distill.logits is not None:
        batch["teacher"] = struct((count, model.num_classes), jnp.float32)
    return batch


def trace(trainer: Trainer) -> Any:
    """The step, traced from abstract values: its jaxpr, and what lowers and compiles it."""
    return trainer.step.trace(trainer.abstract_state, abstract_batch(trainer), trainer.objective)


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and its bytes on each chip."""

    text: str  # optimised HLO; empty if the program does not fit in memory
    arguments: int  # state and batch, by their shardings if the program does not fit
    temporaries: int  # at the peak
    code: int
    seconds: float  # of compilation

    @property
    def memory(self) -> int:
        """Bytes on each chip; outputs are in the place of donated arguments."""
        return self.arguments + self.temporaries + self.code

    @property
    def refused(self) -> bool:
        """Whether the compiler ran out of HBM."""
        return not self.text


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice as targets of AOT compilation.

    Raises:
      UserError: libtpu is not installed, or knows no such slice.
    """
    # There is no TPU to ask about itself, nor one that two processes could want.
    for name in ("TPU_SKIP_MDS_QUERY", "ALLOW_MULTIPLE_LIBTPU_LOAD"):
        os.environ.setdefault(name, "1")
    from jax.experimental import topologies

    if _version("libtpu") is None:
        raise UserError(
            f"compiling for {topology} needs TPU's compiler: "
            'pip install "cait-jax[plan]", in an environment of its own'
        )
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=str(topology))
    except Exception as error:  # of any type
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(f"TPU's compiler knows no slice {topology}: {first}") from error
    return list(found.devices)


def compile_cached(
    lowered: jax.stages.Lowered,
    topology: Topology,
    folder: Path,
    arguments: int,
    say: Callable[[str], Any],
) -> Compiled:
    """Compiles a program that is lowered for `tpu_devices` or `gpu_devices`, or reads it from the cache.

    Args:
      folder: the cache, by a hash of the program and of the versions that compile it.
      arguments: bytes of state and batch on each chip, for a program that does not fit.
      say: called with progress before what takes minutes.

    Raises:
      UserError: the compiler fails for another reason than memory.
    """
    compilers = gpu.PACKAGES if topology.chip.family == "gpu" else ("libtpu",)
    versions = [_version(name) or "" for name in ("jax", "jaxlib", *compilers)]
    name = hashlib.sha256("\n".join([str(topology), *versions, lowered.as_text()]).encode())
    path = folder / f"{name.hexdigest()[:32]}.json.gz"
    if path.is_file():
        with gzip.open(path, "rt") as file:
            return Compiled(**json.load(file))
    say(f"compiling for {topology}; this takes minutes")
    start = time.monotonic()
    compiled = _compile(lowered, topology, arguments, say)
    compiled = dataclasses.replace(compiled, seconds=time.monotonic() - start)
    folder.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    with gzip.open(partial, "wt", compresslevel=6) as file:
        json.dump(dataclasses.asdict(compiled), file)
    partial.rename(path)
    return compiled


def _compile(
    lowered: jax.stages.Lowered, topology: Topology, arguments: int, say: Callable[[str], Any]
) -> Compiled:
    on_gpu = topology.chip.family == "gpu"
    try:
        program = lowered.compile(compiler_options=gpu.COMPILER_OPTIONS if on_gpu else None)
        try:
            text = program.as_text()
        except jax.errors.JaxRuntimeError:
            if on_gpu:
                raise
            say("libtpu cannot print this program; compiling again, without its SparseCores")
            program = lowered.compile(compiler_options=_WITHOUT_SPARSE_CORES)
            text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            first = message.strip().splitlines()[0]
            compiler = "XLA's compiler for GPUs" if on_gpu else "TPU's compiler"
            raise UserError(f"{compiler} fails for {topology}: {first}") from error
        return Compiled("", arguments, needed_bytes(message), 0, 0.0)
    memory: Any = program.memory_analysis()
    return Compiled(
        text=text or "",
        arguments=memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
        seconds=0.0,
    )


def needed_bytes(message: str) -> int:
    """Bytes needed by `... HLO temporaries (22.19G) exceeds available HBM (15.75G) ...`."""
    found = _NEEDED.search(message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """`cait_jax/plan` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cait_jax" / "plan"


MOST_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that was compiled and fits, and bytes on each chip."""

    batch: int  # images on each chip; 0 if no size tried fits
    memory: float
    fixed: (
        float  # does not depend on the batch, by the line from the smallest size tried to this one
    )
    by_image: float  # slope of that line


def largest_batch(
    memory_of: Callable[[int], float], capacity: float, start: int, *, multiple: int = 1
) -> Largest:
    """Finds the largest batch of a chip, in few compilations.

    A line through the memory of two sizes predicts the size that fills the capacity. That size is compiled and the
    line fitted again, until it predicts nothing new; sizes that do not fit serve the fit as well.

    Args:
      memory_of: from images on each chip to the bytes they need.
      capacity: bytes of a chip.
      start: images on each chip to begin with.
      multiple: the result is a multiple of this.
    """
    other = start // 2 // multiple * multiple or start * 2
    known = {size: memory_of(size) for size in (start, other)}
    for _ in range(MOST_TRIES):
        fixed, by_image = _line(known, capacity)
        wanted = int((capacity - fixed) / by_image) // multiple * multiple if by_image > 0 else 0
        too_large = [size for size, memory in known.items() if memory > capacity]
        if too_large:
            wanted = min(wanted, min(too_large) - multiple)
        if wanted < multiple or wanted in known:
            break
        known[wanted] = memory_of(wanted)
    fitting = [size for size, memory in known.items() if memory <= capacity]
    best = max(fitting, default=0)
    # Near the capacity the compiler optimises for memory, and may need less for more images.
    plain = {size: memory for size, memory in known.items() if size in (best, min(known))}
    fixed, by_image = _line(plain if len(plain) == 2 else known, capacity)
    return Largest(best, known.get(best, 0.0), fixed, by_image)


def _line(known: dict[int, float], capacity: float) -> tuple[float, float]:
    """Intercept and slope through the two sizes whose memory is nearest to the capacity."""
    (a, at_a), (b, at_b) = sorted(known.items(), key=lambda item: abs(item[1] - capacity))[:2]
    slope = (at_b - at_a) / (b - a)
    return at_a - slope * a, slope
