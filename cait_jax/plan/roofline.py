"""The least time a step can take on chips whose rates are published (Williams, Waterman and Patterson, 2009).

TPUs: Google Cloud's pages of v5e, v5p and v6e, seen in November 2026 (peak for bfloat16, bandwidths, interconnect,
data centre network by chip); memory is what TPU's compiler lets a program have. GPUs: NVIDIA's data sheets of the
A100 80 GB, H100 and H200 in SXM modules, dense bfloat16, and the network that a DGX has for every GPU; the
RTX 4090 by its architecture's white paper, with PCIe 4.0 x16 between cards and, assumed, 100 Gb/s a card between
machines.

HBM traffic is counted from the optimised HLO. XLA's own count (`compiled.cost_analysis()["bytes accessed"]`) takes
the body of a loop once, however often it runs, and so is of no use for scanned blocks.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from cait_jax.errors import UserError, nearest
from cait_jax.plan.hlo import Array, Collective, Instruction, Program


@dataclasses.dataclass(frozen=True)
class Chip:
    """Peak rates of one chip, per second."""

    name: str  # as in a topology
    family: str  # "tpu" or "gpu"
    operations: float  # in bfloat16; a multiply-accumulate is two
    memory: float  # bytes of HBM that a program can have
    bandwidth: float  # bytes to and from HBM
    link: float  # bytes sent to the chips of its slice or machine
    network: float  # bytes sent to other chips, through the data centre's network
    ring: int = 0  # chips from which on an axis of a slice wraps around; 0: no such axes


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 15.75 * 2**30, 819e9, 200e9, 3.125e9, ring=16),
        Chip("v5p", "tpu", 459e12, 95.73 * 2**30, 2765e9, 600e9, 6.25e9, ring=4),
        Chip("v6e", "tpu", 918e12, 31.24 * 2**30, 1600e9, 400e9, 12.5e9, ring=16),
        Chip("a100", "gpu", 312e12, 80e9, 2039e9, 300e9, 25e9),
        Chip("h100", "gpu", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", "gpu", 989e12, 141e9, 4800e9, 450e9, 50e9),
        Chip("rtx4090", "gpu", 165.2e12, 24e9, 1008e9, 32e9, 12.5e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a shape: the sides of a TPU slice's torus, or machines and GPUs in each."""

    chip: Chip
    shape: tuple[int, ...]

    def __str__(self) -> str:
        """As it is written: `v5e:16x16`."""
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(self.shape)

    def rate(self, span: int = 0, group: int = 0) -> float:
        """Bytes a second that each chip sends in a collective.

        An axis of a slice that does not wrap around has half the links. Between machines, the GPUs of a machine
        that are in one group share what is sent, each by its own network card.

        Args:
          span: GPUs from the first to the last of the group, both counted; 0: all.
          group: chips in the group; 0: all.
        """
        chip = self.chip
        if chip.family == "gpu":
            machines, inside = self.shape
            if (span or self.chips) <= inside:
                return chip.link
            return min(chip.link, chip.network * max(1, (group or self.chips) // machines))
        closed = sum(1.0 if side >= chip.ring else 0.5 for side in self.shape if side > 1)
        return chip.link * (closed or 1.0) / len(self.shape)


def parse_topology(text: str) -> Topology:
    """Reads `"v5e:4x8"`, `"v5p:4x4x8"`, `"h100:8"` (one machine) or `"h100:4x8"` (four).

    Raises:
      UserError: the chip is unknown, or the shape is not one of its kind.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"topology {text[:80]!r} names no known chip; {nearest(name, list(CHIPS))}; write it like v5e:4x8 "
            "or h100:8"
        )
    chip = CHIPS[name]
    sides = {"v5e": (2,), "v6e": (2,), "v5p": (3,)}.get(name, (1, 2))
    if (
        not re.fullmatch(r"[1-9][0-9]{0,5}(x[1-9][0-9]{0,5})*", shape)
        or shape.count("x") + 1 not in sides
    ):
        example = {2: "4x8", 3: "4x4x4", 1: "8"}[sides[0]]
        raise UserError(
            f"topology {text[:80]!r} has no shape of {name}: write it like {name}:{example}"
        )
    numbers = tuple(int(side) for side in shape.split("x"))
    return Topology(chip, numbers if chip.family == "tpu" or len(numbers) > 1 else (1, *numbers))


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step at the chip's peak rates."""

    compute: float
    memory: float  # traffic to and from HBM
    exchange: float  # collectives

    @property
    def seconds(self) -> float:
        """The step's least time: arithmetic, memory and links all overlap."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """Which of the three takes longest."""
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))


def roofline(
    topology: Topology, *, operations: float, traffic: float, exchanged: Iterable[Collective]
) -> Roofline:
    """The bounds of a step: `operations` and HBM `traffic` (bytes) of one chip, and the collectives it is in."""
    chip = topology.chip
    return Roofline(
        compute=operations / chip.operations,
        memory=traffic / chip.bandwidth,
        exchange=sum(
            each.times * sent_bytes(each, topology.chips) / topology.rate(each.span, each.group)
            for each in exchanged
        ),
    )


def sent_bytes(exchange: Collective, chips: int) -> float:
    """Bytes that each chip sends in one collective by the ring algorithm, which sends the least possible.

    `chips` take part where the program names no groups.
    """
    group = exchange.group or chips
    share = (group - 1) / group
    return {
        "all-reduce": 2 * exchange.bytes * share,
        "all-gather": exchange.bytes * share,
        "reduce-scatter": float(exchange.bytes * (group - 1)),
        "all-to-all": exchange.bytes * share,
        "collective-permute": float(exchange.bytes),
    }[exchange.kind]


CHIP_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Bytes a second that a chip sends: between pods of v5e, of v6e, between machines of GPUs; in slices of v5e without
# and with wraparound, of v6e with it, of v5p.
RATES = (3.125e9, 12.5e9, 50e9, 100e9, 200e9, 400e9, 600e9)
HOP_SECONDS = 1e-6
# Of a step, the backward pass: while it runs, gradients can be summed.
OVERLAP = 2 / 3


def exchange_seconds(exchanged: Iterable[Collective], chips: int, rate: float) -> float:
    """Seconds of a data-parallel step's all-reduces on `chips` chips that each send `rate` bytes a second.

    Each all-reduce also waits for its way around a square torus and back, at `HOP_SECONDS` a hop. `exchanged` are
    the collectives of a step compiled for any number of chips.
    """
    if chips == 1:
        return 0.0
    hops: float = chips**0.5  # half of each of two sides, there and back
    return sum(
        each.times
        * (
            sent_bytes(Collective(each.kind, (), each.bytes, 1, chips), chips) / rate
            + hops * HOP_SECONDS
        )
        for each in exchanged
        if each.kind == "all-reduce"
    )


def free_until(
    exchanged: Sequence[Collective],
    step_seconds: float,
    rate: float,
    chips: Sequence[int] = CHIP_COUNTS,
) -> int:
    """The largest number of chips at which all-reduces fit beside the backward pass of `step_seconds` of work."""
    free = (n for n in chips if exchange_seconds(exchanged, n, rate) <= OVERLAP * step_seconds)
    return max(free, default=1)


# These move nothing, or are counted in the computations they call.
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call",
    "after-all", "optimization-barrier", "partition-id", "replica-id", "iota",
}  # fmt: skip
_FREE_CALLS = ('"AllocateBuffer"', '"ConcatBitcast"')
_CONTROL = {"while", "conditional", "call"}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """HBM traffic of one instruction."""

    instruction: Instruction
    bytes: int  # read and written each time, with the padding of tiles
    times: int  # in a step; in a loop whose length depends on the data, 1


def transfers(program: Program) -> Iterator[Transfer]:
    """Lists the instructions of a program that move something.

    A fusion reads its operands and writes its results, once each. Slices, and updates in place, count with their
    own size.
    """
    for name in _on_top(program):
        beside = program.computations[name]
        times = program.times[name]
        for instruction in beside.values():
            if moved := _moved(program, instruction, beside):
                yield Transfer(instruction, moved, 1 if times is None else times)


def memory_traffic(program: Program) -> int:
    """Bytes that a step reads from and writes to HBM."""
    return sum(each.bytes * each.times for each in transfers(program))


def kernel_launches(program: Program) -> int:
    """Kernels, copies and collectives that a step launches; in a loop whose length depends on the data, once."""
    return sum(each.times for each in transfers(program))


def traffic_by_origin(program: Program) -> dict[str, int]:
    """HBM traffic in bytes by pass and module, the most first.

    Keys are `"forward"`, `"backward"` or `"rest"` (augmentation, optimiser, averages), then the module. A fusion
    counts for the one operation that the compiler names it by, so the parts are not exact.
    """
    found: dict[str, int] = {}
    for each in transfers(program):
        origin = _origin(each.instruction.source)
        found[origin] = found.get(origin, 0) + each.bytes * each.times
    return dict(sorted(found.items(), key=lambda item: -item[1]))


def _origin(source: str) -> str:
    way = "backward" if "transpose(" in source else "forward" if "jvp(" in source else "rest"
    if "dynamic_update" in source:
        return f"{way}: put into the stack of what is kept"
    if "dynamic_index" in source or "dynamic_slice" in source:
        return f"{way}: taken from a stack"
    if way == "rest":
        return way if source else "copies and prefetches"
    module = re.search(r"/(blocks\w*|patch_embed|head|norm)((?:/[a-z]\w*)*)(?=/)", source)
    names = [] if module is None else [module[1], *module[2].split("/")[1:]]
    known = [name for name in names if name != "blocks" or name is names[0]]
    return " ".join([f"{way}:", "/".join(known[:3])]) if known else f"{way}: between modules"


def _on_top(program: Program) -> list[str]:
    """Computations that are reached by control flow alone, not through fusions."""
    found, waiting = [], [program.entry]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.append(name)
        for instruction in program.computations[name].values():
            if instruction.opcode in _CONTROL:
                waiting.extend(instruction.called)
    return found


def _moved(program: Program, line: Instruction, beside: Mapping[str, Instruction]) -> int:
    opcode = line.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and any(name in line.rest for name in _FREE_CALLS):
        return 0
    operands = [beside[name].arrays for name in line.operands if name in beside]
    if opcode in ("copy-start", "slice-start"):
        result = line.arrays[0] if opcode == "copy-start" else line.arrays[-2]
        source = operands[0][0]
        return _size([result]) + (0 if source.on_chip else result.padded_bytes)
    if opcode == "fusion":
        return _of_fusion(program, line, operands)
    if opcode in ("dynamic-slice", "slice", "gather"):
        taken = [] if operands[0][0].on_chip else line.arrays
        return sum(array.padded_bytes for array in taken) + _size(line.arrays)
    if opcode == "dynamic-update-slice":
        update = operands[1]
        return _size(update) + (0 if line.arrays[0].on_chip else _whole(update))
    results = line.arrays[len(line.arrays) // 2 :] if opcode.endswith("-start") else line.arrays
    if opcode == "custom-call" and '"__cublas' in line.rest:  # the last of a tuple is its workspace
        results = line.arrays[:-1] or line.arrays
    return sum(map(_size, operands)) + _size(results)


def _of_fusion(program: Program, line: Instruction, operands: list[tuple[Array, ...]]) -> int:
    lines = program.computations[line.called[0]]
    read = 0
    for parameter in (each for each in lines.values() if each.opcode == "parameter"):
        arrays = operands[int(parameter.rest.split(")")[0])]
        if _size(arrays):
            read += min(_size(arrays), _read(program, parameter, lines))
    return read + sum(map(_written, *_results(line, lines)))


def _read(program: Program, line: Instruction, lines: Mapping[str, Instruction]) -> int:
    """Bytes of a value inside a fusion that its users read."""
    total = 0
    for user in (each for each in lines.values() if line.name in each.operands):
        position = user.operands.index(line.name)
        if user.opcode in ("dynamic-slice", "slice", "gather") and not position:
            total += _whole(user.arrays)
        elif user.opcode == "bitcast":
            total += _read(program, user, lines)
        elif user.opcode == "dynamic-update-slice" and not position:
            continue  # in place
        elif user.opcode == "fusion":
            inside = program.computations[user.called[0]]
            parameter = next(
                each
                for each in inside.values()
                if each.opcode == "parameter" and each.rest.startswith(f"{position})")
            )
            total += _read(program, parameter, inside)
        else:
            return _whole(line.arrays)
    return total


def _results(
    line: Instruction, lines: Mapping[str, Instruction]
) -> tuple[Iterable[Array], Iterable[tuple[Instruction, Mapping[str, Instruction]]]]:
    root = next(each for each in lines.values() if each.root)
    parts = [lines[name] for name in root.operands] if root.opcode == "tuple" else [root]
    return line.arrays, [(part, lines) for part in parts]


def _written(result: Array, origin: tuple[Instruction, Mapping[str, Instruction]]) -> int:
    if result.on_chip:
        return 0
    part, lines = origin
    while part.opcode == "bitcast" and part.operands[0] in lines:
        part = lines[part.operands[0]]
    if part.opcode == "dynamic-update-slice":
        return _whole(lines[part.operands[1]].arrays)
    return result.padded_bytes


def _size(arrays: Iterable[Array]) -> int:
    """Of what is in HBM."""
    return sum(array.padded_bytes for array in arrays if not array.on_chip)


def _whole(arrays: Iterable[Array]) -> int:
    return sum(array.padded_bytes for array in arrays)
