"""Arrays as bytes: each row (last axis) in equal steps between its least and its largest value."""

import base64
import dataclasses
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Float32, UInt8

from cait_jax.errors import UserError

LEVELS = 256


@dataclasses.dataclass(frozen=True)
class Quantised:
    """`offset + step * levels`, computed in float64, lies within half a step of the array."""

    levels: UInt8[np.ndarray, "*rows n"]
    offset: Float32[np.ndarray, "*rows"]
    step: Float32[np.ndarray, "*rows"]

    def values(self) -> Float[np.ndarray, "*rows n"]:
        """The stored numbers, float64."""
        offset, step = (part.astype(np.float64)[..., None] for part in (self.offset, self.step))
        values: np.ndarray = offset + step * self.levels
        return values


def quantise(array: Any, levels: int = LEVELS) -> Quantised:
    """Quantises an array of finite values to `levels` steps a row, at most 256.

    Raises:
      UserError: a value is NaN or infinite.
    """
    array = np.asarray(array, np.float32).astype(np.float64)
    if not np.isfinite(array).all():
        raise UserError(
            "the network computes values that are not finite (NaN or infinity), so there is nothing to show: "
            "give weights that are whole, and try float32"
        )
    offset = array.min(axis=-1)
    width = (array.max(axis=-1) - offset) / (levels - 1)
    step = width.astype(np.float32)
    # Rounded up, so that the last level is no less than the largest value.
    step = np.where(step < width, np.nextafter(step, np.float32(np.inf)), step)
    divisor = np.where(step > 0, step, 1).astype(np.float64)
    steps = np.rint((array - offset[..., None]) / divisor[..., None])
    return Quantised(steps.astype(np.uint8), offset.astype(np.float32), step)


def encode(parts: Sequence[Quantised]) -> str:
    """One text for all: base64 of deflated (zlib) offsets, steps, then levels, little-endian, in order."""
    floats = [part.offset for part in parts] + [part.step for part in parts]
    content = b"".join(
        [array.astype("<f4").tobytes() for array in floats]
        + [part.levels.tobytes() for part in parts]
    )
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")
