"""A program compiled for TPUs that are not there, and what the compiler said of it, kept on disk."""

import dataclasses
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

from cait_jax.errors import UserError
from cait_jax.plan.roofline import Topology

_NEEDED = re.compile(r"\(?(\d+(?:\.\d+)?)([KMGT])\)?")
# v5p and v6e gather and scatter on SparseCores, and libtpu 0.0.52 fails to print a program that does.
_WITHOUT_SPARSE_CORES: dict[str, str | bool] = {
    "xla_tpu_offload_gather_to_sparsecore": "false",
    "xla_tpu_enable_offloading_scatter_to_sparsecore": "false",
}
_UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program and its memory.

    Attributes:
      text: the program; empty if the compiler refused it for want of memory.
      arguments: bytes on each chip of state and batch; of the refused, of what their shardings say.
      temporaries: bytes on each chip beside them at the fullest moment.
      code: bytes on each chip of the program itself.
      seconds: compiling took.
    """

    text: str
    arguments: int
    temporaries: int
    code: int
    seconds: float

    @property
    def memory(self) -> int:
        """Bytes on each chip. Outputs lie where donated arguments lay."""
        return self.arguments + self.temporaries + self.code

    @property
    def refused(self) -> bool:
        """Whether the compiler gave up for want of memory."""
        return not self.text


def tpu_devices(topology: Topology) -> list[jax.Device]:
    """The devices of a slice, to compile for and nothing more.

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
    """Compiles a program, or reads what compiling the same one gave before.

    Args:
      lowered: for the devices of `tpu_devices`.
      topology: of these.
      folder: where results are kept, by a sum of the program and of the versions that compile it.
      arguments: bytes of state and batch on each chip, for when the compiler says nothing.
      say: told, when something takes minutes, what.

    Raises:
      UserError: the compiler fails for another reason than memory.
    """
    versions = [_version(name) or "" for name in ("jax", "jaxlib", "libtpu")]
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
    try:
        program = lowered.compile()
        try:
            text = program.as_text()
        except jax.errors.JaxRuntimeError:
            say("libtpu cannot print this program; compiling again, without its SparseCores")
            program = lowered.compile(compiler_options=_WITHOUT_SPARSE_CORES)
            text = program.as_text()
    except jax.errors.JaxRuntimeError as error:
        message = str(error)
        if "RESOURCE_EXHAUSTED" not in message:
            first = message.strip().splitlines()[0]
            raise UserError(f"TPU's compiler fails for {topology}: {first}") from error
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
    """The memory that a refusal names, in bytes.

    Args:
      message: such as `... HLO temporaries (22.19G) exceeds available HBM (15.75G) ...`.
    """
    found = _NEEDED.search(message)
    return round(float(found[1]) * _UNITS[found[2]]) if found else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cache_folder() -> Path:
    """Where results are kept: `cait_jax/plan` in `$XDG_CACHE_HOME`, or in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "cait_jax" / "plan"


MOST_TRIES = 4


@dataclasses.dataclass(frozen=True)
class Largest:
    """The largest batch that was seen to fit.

    Attributes:
      batch: images on each chip; 0 if not even one of the sizes tried fits.
      memory: bytes it takes on each chip.
      fixed: bytes that do not depend on the batch, by the line from the smallest size tried to this one.
      by_image: bytes for each image, likewise.
    """

    batch: int
    memory: float
    fixed: float
    by_image: float


def largest_batch(
    memory_of: Callable[[int], float], capacity: float, start: int, *, multiple: int = 1
) -> Largest:
    """Finds the largest batch of a chip.

    A line through two sizes says which size should fill the memory. That size is tried, and again with what it
    taught, until the line says nothing new. What is above the capacity is as good for the fit as what is below.

    Args:
      memory_of: from images on each chip to the bytes they need; takes minutes, so it is called seldom.
      capacity: bytes there are.
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
    # Near the capacity a compiler tries harder, and at times needs less for more images.
    plain = {size: memory for size, memory in known.items() if size in (best, min(known))}
    fixed, by_image = _line(plain if len(plain) == 2 else known, capacity)
    return Largest(best, known.get(best, 0.0), fixed, by_image)


def _line(known: dict[int, float], capacity: float) -> tuple[float, float]:
    """Through the two sizes whose memory is nearest to the capacity."""
    (a, at_a), (b, at_b) = sorted(known.items(), key=lambda item: abs(item[1] - capacity))[:2]
    slope = (at_b - at_a) / (b - a)
    return at_a - slope * a, slope
