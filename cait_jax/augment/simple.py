"""Augmentation simpler than RandAugment: crops and affine maps of small images, and DeiT III's on uint8 images.

DeiT III: Touvron et al., arXiv 2204.07118, section 3.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, PRNGKeyArray

from cait_jax.augment import randaugment
from cait_jax.augment.randaugment import Image, Scalar

FloatImage = Float[Array, "height width channels"]

_BLUR_RADIUS = (0.1, 2.0)
_SOLARIZE_THRESHOLD = 128


def random_pad_crop(key: PRNGKeyArray, image: FloatImage, padding: int) -> FloatImage:
    """Pads every side with `padding` zeros and crops the original size at a uniform offset."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_affine(
    key: PRNGKeyArray,
    image: FloatImage,
    rotate: float,
    zoom: float,
    shear: float,
    translate: float,
) -> FloatImage:
    """Rotates, zooms, shears and translates, each uniformly up to its limit, see `pipeline.Augmentation`."""
    angle, size, slope, down, right = jax.random.uniform(key, (5,), minval=-1.0, maxval=1.0)
    shift = translate * jnp.stack([down, right])
    return affine(
        image,
        angle=jnp.deg2rad(rotate * angle),
        scale=1.0 + zoom * size,
        shear=shear * slope,
        shift=shift * jnp.array(image.shape[:2], image.dtype),
    )


def affine(
    image: FloatImage,
    *,
    angle: Scalar = 0.0,
    scale: Scalar = 1.0,
    shear: Scalar = 0.0,
    shift: Float[Array, "2"] | Sequence[float] = (0.0, 0.0),
) -> FloatImage:
    """Transforms one image about its centre, bilinearly, with zeros outside.

    `angle` is in radians, counter-clockwise; a `scale` above 1 enlarges; `shear` is columns to the right for every
    row upwards from the centre; `shift` is (down, right) in pixels.
    """
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    unrotate = jnp.array([[cos, sin], [-sin, cos]])
    unshear = jnp.array([[1.0, 0.0], [shear, 1.0]])
    inverse = unshear @ unrotate / scale
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    offset = grid.reshape(2, -1) - (centre + jnp.asarray(shift))[:, None]
    source = (inverse @ offset + centre[:, None]).reshape(2, height, width)

    def sample(channel: Array) -> Array:
        found: Array = ndimage.map_coordinates(channel, list(source), order=1, mode="constant")
        return found

    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


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
