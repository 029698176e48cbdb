"""Colour jitter and three-augment of DeiT III (Touvron et al., arXiv 2204.07118, section 3), on uint8 images."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, PRNGKeyArray

from cait_jax.augment import randaugment
from cait_jax.augment.randaugment import Image, Scalar

_BLUR_RADIUS = (0.1, 2.0)
_SOLARIZE_THRESHOLD = 128


def color_jitter(key: PRNGKeyArray, image: Image, strength: float) -> Image:
    """Brightness, contrast and saturation in random order, as torchvision's `ColorJitter`.

    Each factor is uniform in `[max(0, 1 - strength), 1 + strength]`.
    """
    order_key, factor_key = jax.random.split(key)
    order = jax.random.permutation(order_key, 3)
    low = max(0.0, 1.0 - strength)
    factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=1.0 + strength)
    operations = (randaugment.brightness, randaugment.contrast, randaugment.color)
    for i in range(3):
        image = jax.lax.switch(order[i], operations, image, factors[order[i]])
    return image


def three_augment(key: PRNGKeyArray, image: Image) -> Image:
    """Grayscale, solarisation from 128 or Gaussian blur (sigma uniform in 0.1 to 2 pixels), equally likely."""
    choice_key, radius_key = jax.random.split(key)
    radius = jax.random.uniform(radius_key, (), minval=_BLUR_RADIUS[0], maxval=_BLUR_RADIUS[1])
    branches = (
        randaugment.grayscale,
        lambda image: randaugment.solarize(image, _SOLARIZE_THRESHOLD),
        lambda image: gaussian_blur(image, radius),
    )
    choice = jax.random.randint(choice_key, (), 0, len(branches))
    result: Array = jax.lax.switch(choice, branches, image)
    return result


def gaussian_blur(image: Image, radius: Scalar) -> Image:
    """Pillow's approximation of a Gaussian of standard deviation `radius`, 0 to 2.4 pixels.

    Three box blurs of fractional width along each axis (Gwosdek et al., Theoretical Foundations of Gaussian
    Convolution by Extended Box Filtering, 2011); edge pixels are repeated.
    """
    half = _box_half_width(radius)
    # 8 bits a level and 24 a weight fill an unsigned word.
    one = jnp.uint32(1 << 24)
    inner = (one / (2 * half + 1)).astype(jnp.uint32)
    wide = half >= 1  # then the three inner pixels have full weight, and the outermost two the rest
    edge = (one - jnp.where(wide, 3, 1).astype(jnp.uint32) * inner) // 2
    weights = (inner, jnp.where(wide, inner, edge), jnp.where(wide, edge, 0).astype(jnp.uint32))

    def box(rows: Array) -> Array:
        padded = jnp.pad(rows, ((2, 2), (0, 0), (0, 0)), mode="edge")
        count = rows.shape[0]
        total: Array = weights[0] * rows + jnp.uint32(1 << 23)
        for offset in (1, 2):
            pair = padded[2 - offset :][:count] + padded[2 + offset :][:count]
            total = total + weights[offset] * pair
        return total >> 24

    levels = image.astype(jnp.uint32)
    for _ in range(2):  # along the width first, as Pillow, since each pass is rounded
        levels = jnp.swapaxes(levels, 0, 1)
        for _ in range(3):
            levels = box(levels)
    return levels.astype(jnp.uint8)


def _box_half_width(radius: Scalar) -> Array:
    """Half the width, without the middle pixel, of a box that has a third of the Gaussian's variance."""
    variance = jnp.asarray(radius, jnp.float32) ** 2 / 3
    whole = jnp.floor((jnp.sqrt(12 * variance + 1) - 1) / 2)
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))
