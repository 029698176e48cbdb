"""Random crops and affine transformations for small images that are not cropped as they are decoded."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, PRNGKeyArray

Image = Float[Array, "height width channels"]
Scalar = Float[Array, ""] | float


def random_pad_crop(key: PRNGKeyArray, image: Image, padding: int) -> Image:
    """Pads every side with `padding` zeros and crops the original size at a uniform offset."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_affine(
    key: PRNGKeyArray,
    image: Image,
    rotate: float,
    zoom: float,
    shear: float,
    translate: float,
) -> Image:
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
    image: Image,
    *,
    angle: Scalar = 0.0,
    scale: Scalar = 1.0,
    shear: Scalar = 0.0,
    shift: Float[Array, "2"] | Sequence[float] = (0.0, 0.0),
) -> Image:
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
