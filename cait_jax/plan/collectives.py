"""What a compiled program sends between devices."""

import dataclasses
import math
import re

from cait_jax.plan.program import Array, Instruction, Program

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange of arrays of given shapes.

    Attributes:
      kind: one of `KINDS`.
      arrays: what each device has afterwards, such as `"f32[192,768]"`; of several exchanged at once, all.
      bytes: of these, each time.
      times: how often a run of the program does it; an instruction in a loop counts for every turn.
      group: how many devices exchange with each other; 0 where the program does not say.
      span: how many devices lie between the first and the last of them, both counted; 0 likewise.
    """

    kind: str
    arrays: tuple[str, ...]
    bytes: int
    times: int
    group: int = 0
    span: int = 0


def collectives(program: Program) -> list[Collective]:
    """Lists what a compiled program exchanges.

    Args:
      program: of `read_program`.

    Returns:
      One entry for each kind and shapes, the most bytes in all first.

    Raises:
      ValueError: a loop that exchanges something does not say how many turns it takes.
    """
    found: dict[tuple[str, tuple[str, ...], int], Collective] = {}
    begun: set[str] = set()
    for computation, times in program.times.items():
        lines = program.computations[computation]
        for instruction in lines.values():
            kind = instruction.opcode.removesuffix("-start")
            if kind not in KINDS:
                continue
            if "chain_id=" in instruction.rest:  # spread over what is computed meanwhile
                channel = re.search(r"channel_id=\d+", instruction.rest)
                if channel and channel[0] in begun:
                    continue
                begun.add(channel[0] if channel else instruction.name)
            if times is None:
                raise ValueError(f"{computation} does {kind} in a loop of unknown length")
            arrays = _received(instruction, kind)
            if computation.startswith("all-reduce-scatter"):  # a sum of which a part is kept
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
    """How often each kind is done, and the bytes each device has from it; kinds that occur, by name."""
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
