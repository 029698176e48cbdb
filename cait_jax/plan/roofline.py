"""The least time a step can take on chips whose rates are known (Williams, Waterman and Patterson, 2009)."""

import dataclasses
from collections.abc import Iterable

from cait_jax.plan.chips import Topology
from cait_jax.plan.collectives import Collective


@dataclasses.dataclass(frozen=True)
class Roofline:
    """What bounds a step.

    Attributes:
      compute: seconds for its arithmetic at the chip's peak.
      memory: seconds for its traffic to and from main memory.
      exchange: seconds for what the chips send each other.
    """

    compute: float
    memory: float
    exchange: float

    @property
    def seconds(self) -> float:
        """Of a step in which arithmetic, memory and links are all busy at once."""
        return max(self.compute, self.memory, self.exchange)

    @property
    def bound(self) -> str:
        """The name of what takes longest."""
        return max(("compute", "memory", "exchange"), key=lambda name: getattr(self, name))


def roofline(
    topology: Topology, *, operations: float, traffic: float, exchanged: Iterable[Collective]
) -> Roofline:
    """The bounds of a step.

    Args:
      topology: the chips.
      operations: of a chip, in a step.
      traffic: bytes between a chip and its memory.
      exchanged: what a chip takes part in.
    """
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
    """Bytes that each chip sends for one exchange, done in rings: the least that is possible.

    Args:
      exchange: what is exchanged.
      chips: how many take part where the program does not say.
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
