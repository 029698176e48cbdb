"""Published rates of chips, and how many of them stand in which shape.

TPUs: Google Cloud's pages of v5e, v5p and v6e, seen in November 2026 (peak for bfloat16, bandwidths, interconnect,
data centre network by chip); memory is what TPU's compiler lets a program have. GPUs: NVIDIA's data sheets of the
A100 80 GB, H100 and H200 in SXM modules, dense bfloat16, and the network that a DGX has for every GPU.
"""

import dataclasses
import math
import re

from cait_jax.errors import UserError, nearest


@dataclasses.dataclass(frozen=True)
class Chip:
    """What one chip can do at most.

    Attributes:
      name: as in a topology.
      family: `"tpu"` or `"gpu"`.
      operations: a second, in bfloat16; a multiply-accumulate is two.
      memory: bytes that a program can have.
      bandwidth: bytes a second to and from that memory.
      link: bytes a second that it can send to the chips of its slice or machine.
      network: bytes a second that it can send to chips elsewhere, through the network.
      ring: chips on an axis of a slice from which on the axis is closed to a ring; 0: no such axes.
    """

    name: str
    family: str
    operations: float
    memory: float
    bandwidth: float
    link: float
    network: float
    ring: int = 0


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v5e", "tpu", 197e12, 15.75 * 2**30, 819e9, 200e9, 3.125e9, ring=16),
        Chip("v5p", "tpu", 459e12, 95.73 * 2**30, 2765e9, 600e9, 6.25e9, ring=4),
        Chip("v6e", "tpu", 918e12, 31.24 * 2**30, 1600e9, 400e9, 12.5e9, ring=16),
        Chip("a100", "gpu", 312e12, 80e9, 2039e9, 300e9, 25e9),
        Chip("h100", "gpu", 989e12, 80e9, 3350e9, 450e9, 50e9),
        Chip("h200", "gpu", 989e12, 141e9, 4800e9, 450e9, 50e9),
    )
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """Chips in a shape.

    Attributes:
      chip: what each of them is.
      shape: of a TPU slice, the sides of the torus; of GPUs, machines and GPUs in each.
    """

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
        """Bytes a second that each chip sends while a group of them exchange.

        A side of a slice that is not closed to a ring has half the links to send on. Between machines, the GPUs of
        a machine that are of one group share what is to be sent, each by its own network card.

        Args:
          span: of GPUs, how many lie between the first and the last of the group, both counted; 0: all.
          group: how many exchange; 0: all.
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
    """Reads a topology.

    Args:
      text: such as `"v5e:4x8"`, `"v5p:4x4x8"`, `"h100:8"` (one machine) or `"h100:4x8"` (four).

    Raises:
      UserError: the chip is unknown, or the shape is none.
    """
    name, _, shape = text.partition(":")
    if name not in CHIPS:
        raise UserError(
            f"topology {text!r} names no known chip; {nearest(name, list(CHIPS))}; write it like v5e:4x8 "
            "or h100:8"
        )
    chip = CHIPS[name]
    sides = {"v5e": (2,), "v6e": (2,), "v5p": (3,)}.get(name, (1, 2))
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", shape) or shape.count("x") + 1 not in sides:
        example = {2: "4x8", 3: "4x4x4", 1: "8"}[sides[0]]
        raise UserError(f"topology {text!r} has no shape of {name}: write it like {name}:{example}")
    numbers = tuple(int(side) for side in shape.split("x"))
    return Topology(chip, numbers if chip.family == "tpu" or len(numbers) > 1 else (1, *numbers))
