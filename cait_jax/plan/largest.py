"""The largest batch that fits, from the memory of few that were compiled."""

import dataclasses
from collections.abc import Callable

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
