"""What a compiled program sends between devices, read from its text."""

import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")

_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64}
_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(
    r"^(?:ROOT )?%?[\w.\-]+ = (\(.*?\)|[^\s(]+) ([\w\-]+)\(", re.ASCII
)  # a tuple's parts stand in brackets of their own
_ARRAY = re.compile(r"\b(pred|bf16|f16|f32|f64|[su]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|condition|body|branch_computations)=\{?(%?[\w.\-]+(?:, %[\w.\-]+)*)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange of arrays of given shapes.

    Attributes:
      kind: one of `KINDS`.
      arrays: what each device has afterwards, such as `"f32[192,768]"`; of several exchanged at once, all.
      bytes: of these, each time.
      times: how often a run of the program does it; an instruction in a loop counts for every turn.
    """

    kind: str
    arrays: tuple[str, ...]
    bytes: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Lists what a compiled program exchanges.

    Args:
      text: of `jitted.lower(...).compile().as_text()`.

    Returns:
      One entry for each kind and shapes, the most bytes in all first.

    Raises:
      ValueError: a loop that exchanges something does not say how many turns it takes.
    """
    computations, entry = _computations(text)
    times = _times(computations, entry)
    found: dict[tuple[str, tuple[str, ...]], int] = {}
    for name, lines in computations.items():
        for line in lines:
            match = _INSTRUCTION.match(line)
            kind = match and match[2].removesuffix("-start")
            if not match or kind not in KINDS:
                continue
            count = times.get(name, 0)
            if count is None:
                raise ValueError(f"{name} does {kind} in a loop of unknown length")
            arrays = [array[0] for array in _ARRAY.finditer(match[1])]
            if match[2].endswith("-start") and kind != "all-reduce" and len(arrays) > 1:
                arrays = arrays[len(arrays) // 2 :]  # operands come first
            key = kind, tuple(sorted(arrays))
            found[key] = found.get(key, 0) + count
    result = [
        Collective(kind, arrays, sum(map(_bytes, arrays)), count)
        for (kind, arrays), count in found.items()
        if count
    ]
    return sorted(result, key=lambda each: (-each.bytes * each.times, each.kind, each.arrays))


def totals(exchanged: list[Collective]) -> dict[str, tuple[int, int]]:
    """How often each kind is done, and the bytes each device has from it; kinds that occur, by name."""
    return {
        kind: (
            sum(each.times for each in exchanged if each.kind == kind),
            sum(each.times * each.bytes for each in exchanged if each.kind == kind),
        )
        for kind in sorted({each.kind for each in exchanged})
    }


def _computations(text: str) -> tuple[dict[str, list[str]], str]:
    computations: dict[str, list[str]] = {}
    entry, lines = "", []
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            lines = computations.setdefault(match[1], [])
            entry = match[1] if line.startswith("ENTRY") else entry
        elif line.startswith(" "):
            lines.append(line.strip())
    return computations, entry


def _times(computations: dict[str, list[str]], entry: str) -> dict[str, int | None]:
    """How often each computation runs; None where that depends on the data."""
    times: dict[str, int | None] = {}

    def visit(name: str, count: int | None) -> None:
        before = times.get(name, 0)
        times[name] = None if count is None or before is None else before + count
        for line in computations.get(name, ()):
            called = [
                part.strip(" %") for each in _CALLED.findall(line) for part in each.split(",")
            ]
            inside = count
            if " while(" in line:
                turns = _TRIPS.search(line)
                inside = None if turns is None or count is None else count * int(turns[1])
            for child in called:
                if child in computations:
                    visit(child, inside)

    visit(entry, 1)
    return times


def _bytes(array: str) -> int:
    match = _ARRAY.fullmatch(array)
    assert match is not None
    bits = _BITS.get(match[1]) or int(match[1][1:])
    return math.prod(int(size) for size in match[2].split(",") if size) * bits // 8
