"""An affine transformation of one 8-bit image, in the arithmetic of Pillow."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from cait_jax.data.pixels import grayscale

Image = UInt8[Array, "height width channels"]


def warp(
    image: Image, inverse: Float[Array, "2 3"], fill: tuple[int, int, int] = (0, 0, 0)
) -> Image:
    """Transforms one image affinely, bicubically, as Pillow's `Image.transform` does.

    Pixel centres lie at halves. The cubic kernel has a = -1 (Keys, Cubic Convolution Interpolation, 1981),
    inside the image the border is continued by its outermost pixel, and results are rounded towards 0.
    Coordinates are float32 and Pillow's are float64: some levels come out one more or less.

    Args:
      image: one image of 1 or 3 channels.
      inverse: from a place (x, y, 1) of the result to its source (x, y), in pixels.
      fill: red, green and blue of what comes from outside; an image of one channel gets its luminance.
    """
    height, width, channels = image.shape
    across = jnp.arange(width)[None, :] + 0.5
    down = jnp.arange(height)[:, None] + 0.5
    x, y = (row[0] * across + row[1] * down + row[2] for row in inverse)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, column_weights = _taps(x - 0.5, width)
    rows, row_weights = _taps(y - 0.5, height)

    # One lookup for all channels: they lie in the bytes of one word.
    shifts = [8 * i for i in range(channels)]
    words = sum(image[..., i].astype(jnp.uint32) << shift for i, shift in enumerate(shifts))
    words = jnp.asarray(words).reshape(-1)
    total = [jnp.zeros((height, width))] * channels
    for row, row_weight in zip(rows, row_weights, strict=True):
        line = [jnp.zeros((height, width))] * channels
        for column, weight in zip(columns, column_weights, strict=True):
            word = words[row * width + column]
            levels = [((word >> shift) & 255).astype(jnp.float32) for shift in shifts]
            line = [old + weight * level for old, level in zip(line, levels, strict=True)]
        total = [old + row_weight * new for old, new in zip(total, line, strict=True)]
    found = jnp.clip(jnp.stack(total, axis=-1), 0, 255).astype(jnp.uint8)
    outside = jnp.array(fill, jnp.uint8).reshape(1, 1, 3)
    outside = outside if channels == 3 else grayscale(outside)[..., :1]
    return jnp.where(inside[..., None], found, outside)


def _taps(place: Array, size: int) -> tuple[list[Array], tuple[Array, ...]]:
    """The four pixels about each place, inside an axis of `size`, and their cubic weights."""
    first = jnp.floor(place)
    d = place - first
    pixels = [jnp.clip(first.astype(jnp.int32) + i, 0, size - 1) for i in (-1, 0, 1, 2)]
    weights = (-d * (1 - d) ** 2, 1 + d**2 * (d - 2), d * (1 + d * (1 - d)), d**2 * (d - 1))
    return pixels, weights
