"""Strong scaling: the same batch, hence the same run, on more and more chips."""

import dataclasses
from collections.abc import Sequence

from cait_jax.errors import UserError
from cait_jax.plan.plan import Plan
from cait_jax.plan.roofline import Roofline, exchange_seconds

IMAGES_A_CORE = 428.0
"""Training images of ImageNet that a core reads, decodes and crops in a second, by `benchmarks/input.py`."""


@dataclasses.dataclass(frozen=True)
class Scaled:
    """A step on some number of chips: planned there, or by the line through two plans."""

    chips: int
    batch_size: int  # on all chips
    bounds: Roofline
    planned: bool

    @property
    def images_per_second(self) -> float:
        """Of all chips, at most."""
        return self.batch_size / self.bounds.seconds

    def hours(self, images: int) -> float:
        """The least time for so many training images."""
        return images / self.images_per_second / 3600


def strong_scaling(plans: Sequence[Plan]) -> list[Scaled]:
    """The steps of plans of one batch size, the fewest chips first, then those up to one image a chip.

    What is not planned doubles the chips. Operations and traffic of a chip are on the line through the two plans
    with the most chips, as functions of its images; its all-reduces are those of the last plan at the rate of the
    link, as if the chips were one slice, with the hops that `exchange_seconds` adds and plans leave out. Without
    two plans on one kind of chip nothing is added.

    Raises:
      UserError: a plan does not fit its chips.
    """
    found = []
    plans = sorted(plans, key=lambda plan: plan.topology.chips)
    for plan in plans:
        if plan.roofline is None or not plan.fits:
            raise UserError(
                f"the step does not fit {plan.topology}: leave it out, or give more chips"
            )
        found.append(Scaled(plan.topology.chips, plan.batch_size, plan.roofline, planned=True))
    if len(plans) < 2:
        return found
    few, many = plans[-2:]
    chip, batch = many.topology.chip, many.batch_size
    if few.topology.chip != chip or few.by_chip == many.by_chip:
        return found

    def at(images: float, before: float, after: float) -> float:
        slope = (before - after) / (few.by_chip - many.by_chip)
        return after + slope * (images - many.by_chip)

    chips = 2 * many.topology.chips
    while chips <= batch:
        images = batch / chips
        bounds = Roofline(
            compute=at(images, few.operations, many.operations) / chip.operations,
            memory=at(images, float(few.traffic or 0), float(many.traffic or 0)) / chip.bandwidth,
            exchange=exchange_seconds(many.exchanged or (), chips, chip.link),
        )
        found.append(Scaled(chips, batch, bounds, planned=False))
        chips *= 2
    return found
