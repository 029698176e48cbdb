"""Weak scaling on paper: the same work on each chip, more and more chips, and what they then send each other."""

from collections.abc import Iterable, Sequence

from cait_jax.plan.collectives import Collective
from cait_jax.plan.roofline import sent_bytes

CHIPS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
# Bytes a second that a chip sends: between pods of v5e, of v6e, between machines of GPUs; in open and closed
# slices of v5e, closed ones of v6e, in v5p.
RATES = (3.125e9, 12.5e9, 50e9, 100e9, 200e9, 400e9, 600e9)
HOP_SECONDS = 1e-6
# Of a step, the backward pass: while it runs, gradients can be summed.
OVERLAP = 2 / 3


def exchange_seconds(exchanged: Iterable[Collective], chips: int, rate: float) -> float:
    """Seconds for what a data-parallel step exchanges.

    Each chip sends what a ring makes it send, and each sum waits for its way around a square torus and back, at
    `HOP_SECONDS` a hop.

    Args:
      exchanged: of a step compiled for any number of chips; only what all of them exchange counts.
      chips: how many there are.
      rate: bytes a second that each of them sends.
    """
    if chips == 1:
        return 0.0
    hops = chips**0.5  # half of each of two sides, there and back
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
    exchanged: Sequence[Collective], step_seconds: float, rate: float, chips: Sequence[int] = CHIPS
) -> int:
    """The largest of `chips` at which a step's exchange fits beside its backward pass.

    Args:
      exchanged: of the step.
      step_seconds: of a chip's own work.
      rate: bytes a second that each chip sends.
      chips: numbers to look at.
    """
    free = (n for n in chips if exchange_seconds(exchanged, n, rate) <= OVERLAP * step_seconds)
    return max(free, default=1)
