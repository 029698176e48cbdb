"""What happens to the pixels of one 8-bit image where they are, in the arithmetic of Pillow.

Pillow is what the published recipes were made with. `tests/data/test_pixels.py` holds each operation to
Pillow's own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

Image = UInt8[Array, "height width channels"]
Number = Float[Array, ""] | float
Level = Int[Array, ""] | int


def auto_contrast(image: Image) -> Image:
    """Stretches each channel so that its least level becomes 0 and its greatest 255.

    A channel of one level stays. Levels are rounded down; where the exact quotient is an integer, Pillow's own,
    in floating point, may come out one less.
    """
    low = image.min((0, 1), keepdims=True).astype(jnp.float32)
    high = image.max((0, 1), keepdims=True).astype(jnp.float32)
    # Half of a step of the numerator keeps a quotient that is an integer from being rounded below it.
    stretched = (255.0 * (image.astype(jnp.float32) - low) + 0.5) / jnp.maximum(high - low, 1.0)
    return jnp.where(high > low, jnp.minimum(stretched, 255.0).astype(jnp.uint8), image)


def equalize(image: Image) -> Image:
    """Maps the levels of each channel so that their histogram becomes as even as it can; exact."""

    def one(channel: Array) -> Array:
        histogram = jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1)
        greatest = histogram[channel.max()]
        step = (channel.size - greatest) // 255
        below = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.uint8)[channel]

    return jnp.stack([one(image[..., i]) for i in range(image.shape[-1])], axis=-1)


def invert(image: Image) -> Image:
    """Takes every level from 255."""
    return 255 - image


def posterize(image: Image, bits: Level) -> Image:
    """Keeps the `bits` most significant bits of each level, 0 (black) to 8."""
    return image & (256 - (1 << (8 - jnp.asarray(bits)))).astype(jnp.uint8)


def solarize(image: Image, threshold: Level) -> Image:
    """Inverts the levels from `threshold`, 0 to 256, upwards."""
    return jnp.where(image.astype(jnp.int32) < threshold, image, 255 - image)


def solarize_add(image: Image, addend: Level) -> Image:
    """Adds `addend`, 0 to 128, to the levels below 128; 255 is the most."""
    levels = image.astype(jnp.int32)
    return jnp.where(levels < 128, jnp.minimum(levels + addend, 255), levels).astype(jnp.uint8)


def grayscale(image: Image) -> Image:
    """Gives all channels the luminance (ITU-R 601-2); exact."""
    return jnp.broadcast_to(_luminance(image), image.shape).astype(jnp.uint8)


def color(image: Image, factor: Number) -> Image:
    """Moves from grey (0) through the image (1) to stronger colours (above 1)."""
    return _blend(grayscale(image), image, factor)


def contrast(image: Image, factor: Number) -> Image:
    """Moves from the mean luminance, rounded (0), through the image (1) to more contrast (above 1)."""
    luminance = _luminance(image)
    mean = (2 * luminance.sum() + luminance.size) // (2 * luminance.size)
    return _blend(jnp.full(image.shape, mean), image, factor)


def brightness(image: Image, factor: Number) -> Image:
    """Multiplies every level."""
    return _blend(jnp.zeros_like(image), image, factor)


def sharpness(image: Image, factor: Number) -> Image:
    """Moves from a smoothed image (0) through the image (1) to a sharper one (above 1).

    Smoothing weighs a pixel by 5/13 and each of its eight neighbours by 1/13, and leaves the border as it is.
    """
    levels = image.astype(jnp.int32)
    columns = levels[:-2] + levels[1:-1] + levels[2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * levels[1:-1, 1:-1]
    smooth = levels.at[1:-1, 1:-1].set((2 * total + 13) // 26)
    return _blend(smooth, image, factor)


def gaussian_blur(image: Image, radius: Number) -> Image:
    """Blurs as Pillow approximates a Gaussian: by three box blurs along each axis.

    The boxes have a fractional width (Gwosdek et al., Theoretical Foundations of Gaussian Convolution by
    Extended Box Filtering, 2011). Borders are continued by their outermost pixel.

    Args:
      image: one image.
      radius: standard deviation of the Gaussian in pixels, from 0 to 2.4.
    """
    half = _box_half_width(radius)
    # 8 bits a level and 24 a weight fill 32 bits without a sign.
    one = jnp.uint32(1 << 24)
    inner = (one / (2 * half + 1)).astype(jnp.uint32)
    wide = half >= 1  # then the three inner pixels have full weight, and the outermost two the rest
    edge = (one - jnp.where(wide, 3, 1).astype(jnp.uint32) * inner) // 2
    weights = (inner, jnp.where(wide, inner, edge), jnp.where(wide, edge, 0).astype(jnp.uint32))

    def box(rows: Array) -> Array:
        padded = jnp.pad(rows, ((2, 2), (0, 0), (0, 0)), mode="edge")
        count = rows.shape[0]
        total = weights[0] * rows + jnp.uint32(1 << 23)
        for offset in (1, 2):
            pair = padded[2 - offset :][:count] + padded[2 + offset :][:count]
            total = total + weights[offset] * pair
        return total >> 24

    levels = image.astype(jnp.uint32)
    for _ in range(2):  # along the width first, as in Pillow: results of each pass are rounded
        levels = jnp.swapaxes(levels, 0, 1)
        for _ in range(3):
            levels = box(levels)
    return levels.astype(jnp.uint8)


def _box_half_width(radius: Number) -> Array:
    """Half the width, less the middle pixel, of the box whose third power has the Gaussian's variance."""
    variance = jnp.asarray(radius, jnp.float32) ** 2 / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def _luminance(image: Array) -> Array:
    levels = image.astype(jnp.int32)
    if image.shape[-1] == 1:
        return levels
    red, green, blue = (levels[..., i : i + 1] for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def _blend(start: Array, image: Array, factor: Number) -> Array:
    """`start + factor * (image - start)`, rounded towards 0 between 0 and 255."""
    first, second = start.astype(jnp.float32), image.astype(jnp.float32)
    return jnp.clip(first + factor * (second - first), 0, 255).astype(jnp.uint8)
