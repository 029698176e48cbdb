"""Random erasing (Zhong et al., arXiv 1708.04896) of normalised images."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cait_jax.data.per_example import for_each_example

_ATTEMPTS = 10


def random_erase(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    example_ids: Int[Array, "batch"],
    probability: float = 0.25,
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Float[Array, "batch height width channels"]:
    """Fills one box of an image with noise, drawn from N(0, 1) for every pixel and channel.

    Args:
      key: the key of the step and purpose.
      images: normalised, so that N(0, 1) is what pixels look like.
      example_ids: position of each image in the global batch.
      probability: that an image is erased; 0 returns `images`.
      area: the least and greatest part of the image's area in the box, drawn uniformly.
      aspect: the least and greatest height over width of the box, drawn uniformly in the logarithm.

    Returns:
      The images, of the same shape and dtype.
    """
    if not probability:
        return images
    one = functools.partial(_erase_one, probability=probability, area=area, aspect=aspect)
    return for_each_example(one, key, images, example_ids)


def _erase_one(
    key: PRNGKeyArray,
    image: Array,
    *,
    probability: float,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Array:
    whether, where, noise_key = jax.random.split(key, 3)

    def erased(image: Array) -> Array:
        box = sample_erasure(where, (image.shape[0], image.shape[1]), area=area, aspect=aspect)
        noise = jax.random.normal(noise_key, image.shape, image.dtype)
        return jnp.where(box[..., None], noise, image)

    happens = jax.random.bernoulli(whether, probability)
    return jax.lax.cond(happens, erased, lambda image: image, image)


def sample_erasure(
    key: PRNGKeyArray,
    size: tuple[int, int],
    *,
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Bool[Array, "height width"]:
    """Draws the box of `random_erase`: the first of ten draws that is less than the image both ways.

    Args:
      key: of this image.
      size: height and width of the image in pixels.
      area: as in `random_erase`.
      aspect: as in `random_erase`.

    Returns:
      True inside the box; False everywhere if none of the draws fits.
    """
    height, width = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    areas = jax.random.uniform(area_key, (_ATTEMPTS,), minval=area[0], maxval=area[1])
    log_aspect = (math.log(aspect[0]), math.log(aspect[1]))
    aspects = jnp.exp(
        jax.random.uniform(aspect_key, (_ATTEMPTS,), minval=log_aspect[0], maxval=log_aspect[1])
    )
    heights = jnp.round(jnp.sqrt(areas * height * width * aspects)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas * height * width / aspects)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box = jnp.stack([heights[first], widths[first]])
    room = jnp.array([height, width]) - box
    top, left = jax.random.randint(place_key, (2,), 0, jnp.maximum(room, 0) + 1)
    down, across = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    inside = (down >= top) & (down < top + box[0]) & (across >= left) & (across < left + box[1])
    return inside & fits[first]
