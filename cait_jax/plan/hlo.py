"""Optimised HLO, parsed: computations, instructions, arrays and how often each runs; its collectives."""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[suf]\d+\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_COMMENT = re.compile(r"/\*.*?\*/")


@dataclasses.dataclass(frozen=True)
class Array:
    """An array of a program, with its layout in memory."""

    dtype: str  # HLO's, such as "bf16"
    shape: tuple[int, ...]
    layout: str = ""  # HLO's, such as "1,0:T(8,128)S(1)"; empty if the text does not say

    def __str__(self) -> str:
        """Without its layout: `f32[192,768]`."""
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"

    @property
    def bits(self) -> int:
        """Of one element."""
        digits = re.match(r"[a-z]+(\d+)", self.dtype)
        return _BITS.get(self.dtype) or int(digits[1] if digits else 8)

    @property
    def bytes(self) -> int:
        """Without padding."""
        return math.prod(self.shape) * self.bits // 8

    @functools.cached_property
    def padded_bytes(self) -> int:
        """In memory: TPUs pad the two minor axes to whole tiles."""
        order, _, rest = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", rest)
        if not tile or not order:
            return self.bytes
        sizes = [self.shape[int(axis)] for axis in reversed(order.split(","))]
        tiles = [int(size) for size in tile[1].split(",")]
        if len(tiles) > len(sizes):
            sizes = [1] * (len(tiles) - len(sizes)) + sizes
        split = len(sizes) - len(tiles)
        sizes[split:] = [
            -(-size // each) * each for size, each in zip(sizes[split:], tiles, strict=True)
        ]
        return math.prod(sizes) * self.bits // 8

    @property
    def on_chip(self) -> bool:
        """Whether it is in on-chip memory instead of HBM."""
        return bool(re.search(r"S\([1-9]\d*\)", self.layout))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction of a computation."""

    name: str  # unique in the program
    opcode: str
    arrays: tuple[Array, ...]  # its result, flattened
    operands: tuple[str, ...]  # names of instructions of the same computation
    called: tuple[str, ...]  # names of computations
    rest: str  # the line after the operands: attributes and metadata
    root: bool

    @property
    def source(self) -> str:
        """The traced operation it comes from: its metadata's `op_name`."""
        match = re.search(r'op_name="([^"]*)"', self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Program:
    """Computations by name, each its instructions by name in the order in which they run."""

    computations: Mapping[str, Mapping[str, Instruction]]
    entry: str

    @functools.cached_property
    def times(self) -> dict[str, int | None]:
        """How often each computation runs; None where that depends on the data."""
        times: dict[str, int | None] = {}

        def visit(name: str, count: int | None) -> None:
            before = times.get(name, 0)
            times[name] = None if count is None or before is None else before + count
            for instruction in self.computations[name].values():
                inside = count
                if instruction.opcode == "while":
                    turns = self._turns(instruction)
                    inside = None if turns is None or count is None else count * turns
                for child in instruction.called:
                    if child in self.computations:
                        visit(child, inside)

        visit(self.entry, 1)
        return times

    def running(self) -> Iterator[tuple[Instruction, Mapping[str, Instruction], int | None]]:
        """Every instruction that runs, with those of its computation, and how often."""
        for name, count in self.times.items():
            beside = self.computations[name]
            for instruction in beside.values():
                yield instruction, beside, count

    def _turns(self, loop: Instruction) -> int | None:
        """Of a loop that counts up from 0, as every `jax.lax.scan` does."""
        if said := _TRIPS.search(loop.rest):
            return int(said[1])
        condition = re.search(r"condition=%?([\w.\-]+)", loop.rest)
        lines = self.computations.get(condition[1], {}) if condition else {}
        root = next((line for line in lines.values() if line.root), None)
        if root is None or root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        limit = lines.get(root.operands[1])
        value = limit and limit.opcode == "constant" and re.match(r"(\d+)\)", limit.rest)
        return int(value[1]) if value else None


def read_program(text: str) -> Program:
    """Parses the text of `jitted.lower(...).compile().as_text()`."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, lines = "", dict[str, Instruction]()
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[2], {})
            entry = match[2] if match[1] else entry
        elif line.startswith(" ") and (instruction := _instruction(line.strip())):
            lines[instruction.name] = instruction
    return Program(computations, entry)


def arrays_in(text: str) -> tuple[Array, ...]:
    """The arrays of an array's or a tuple's type."""
    return tuple(
        Array(
            dtype,
            tuple(int(size.lstrip("<=")) for size in shape.split(",") if size),
            layout or "",
        )
        for dtype, shape, layout in _ARRAY.findall(text)
    )


def _instruction(line: str) -> Instruction | None:
    root = line.startswith("ROOT ")
    name, equals, rest = line.removeprefix("ROOT ").partition(" = ")
    if not equals:
        return None
    rest = _COMMENT.sub("", rest)
    end = _closing(rest) + 1 if rest.startswith("(") else rest.find(" ")
    result, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 1
    inside, after = rest[:end], rest[end:]
    if opcode in ("constant", "parameter"):  # what is inside is a value
        return Instruction(name.lstrip("%"), opcode, arrays_in(result), (), (), rest, root)
    called = tuple(
        part.strip(" %{}") for each in _CALLED.findall(after) for part in each.split(",")
    )
    operands = tuple(part.split()[-1].lstrip("%") for part in _parts(inside) if part.strip())
    return Instruction(name.lstrip("%"), opcode, arrays_in(result), operands, called, after, root)


def _closing(text: str) -> int:
    """Where the bracket that a text begins with is closed."""
    depth = 0
    for match in re.finditer(r"[()]", text):
        depth += 1 if match[0] == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _parts(text: str) -> Iterator[str]:
    """What commas outside of all brackets part."""
    depth, start = 0, 0
    for match in re.finditer(r"[\[({\])},]", text):
        if match[0] in "[({":
            depth += 1
        elif match[0] in "])}":
            depth -= 1
        elif not depth:
            yield text[start : match.start()]
            start = match.end()
    yield text[start:]


KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind, one group size and the same result shapes in a program."""

    kind: str  # one of `KINDS`
    arrays: tuple[str, ...]  # result on each device, such as "f32[192,768]"
    bytes: int  # of the result, each time
    times: int  # in a run of the program; in a loop, once an iteration
    group: int = 0  # devices in a replica group; 0 where the program does not say
    span: int = (
        0  # devices from the first to the last of a group, both counted; 0 where it is not known
    )


def collectives(program: Program) -> list[Collective]:
    """A program's collectives, the most bytes in total first.

    Raises:
      ValueError: one is in a loop of unknown length.
    """
    found: dict[tuple[str, tuple[str, ...], int], Collective] = {}
    begun: set[str] = set()
    for computation, times in program.times.items():
        lines = program.computations[computation]
        for instruction in lines.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if (
                "chain_id=" in instruction.rest
            ):  # pieces of one collective, overlapped with computation
                channel = re.search(r"channel_id=\d+", instruction.rest)
                if channel and channel[0] in begun:
                    continue
                begun.add(channel[0] if channel else instruction.name)
            if times is None:
                raise ValueError(f"{computation} does {kind} in a loop of unknown length")
            arrays = _received(instruction, kind)
            if computation.startswith(
                "all-reduce-scatter"
            ):  # an all-reduce of which a part is kept
                kind = "reduce-scatter"
                arrays = next(line for line in lines.values() if line.root).arrays
            names, group = tuple(sorted(map(str, arrays))), _group(instruction)
            before = found.get((kind, names, group))
            found[kind, names, group] = Collective(
                kind,
                names,
                sum(array.bytes for array in arrays),
                times + (before.times if before else 0),
                group,
            )
    done = [each for each in found.values() if each.times]
    return sorted(done, key=lambda each: (-each.bytes * each.times, each.kind, each.arrays))


def totals(exchanged: list[Collective]) -> dict[str, tuple[int, int]]:
    """Count and bytes on each device of each kind that occurs, in alphabetical order."""
    return {
        kind: (
            sum(each.times for each in exchanged if each.kind == kind),
            sum(each.times * each.bytes for each in exchanged if each.kind == kind),
        )
        for kind in sorted({each.kind for each in exchanged})
    }


def _group(instruction: Instruction) -> int:
    """Groups are written as `{{0,1},{2,3}}`, as `[2,2]<=[4]`, or as `mesh['a'=2,'b'=2] {'b'}`."""
    text = instruction.rest
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", text):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}", text):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        return math.prod(int(sizes.get(axis, 1)) for axis in re.findall(r"'(\w+)'", named[2]))
    return 0


def _received(instruction: Instruction, kind: str) -> tuple[Array, ...]:
    arrays = instruction.arrays
    if instruction.opcode.endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
        arrays = tuple(array for array in arrays if array.shape)  # scalars are the pair's own
        return arrays[len(arrays) // 2 :]  # operands come first
    return arrays
