"""HBM traffic of a compiled step, counted from its optimised HLO.

XLA's own count (`compiled.cost_analysis()["bytes accessed"]`) takes the body of a loop once, however often it
runs, and so is of no use for scanned blocks.
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping

from cait_jax.plan.hlo import Array, Instruction, Program

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
