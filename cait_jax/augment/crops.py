"""Random resized crops on the device, and the views of an image that self-supervised training compares."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cait_jax.augment import randaugment, simple
from cait_jax.augment.pipeline import random_hflip
from cait_jax.augment.randaugment import Image

Box = Int[Array, "4"]

_ATTEMPTS = 10
_JITTER_PROB = 0.8
_GRAYSCALE_PROB = 0.2
_BLUR_RADIUS = (0.1, 2.0)
_SOLARIZE_THRESHOLD = 128


@dataclasses.dataclass(frozen=True)
class View:
    """How a view of an image is drawn.

    Attributes:
      size: height and width in pixels.
      scale: least and greatest share of the image's area that the crop covers.
      ratio: least and greatest width over height of the crop.
      hflip: mirror with probability 1/2.
      color_jitter: largest relative change of brightness, contrast and saturation, made with probability 0.8.
      blur: probability of a Gaussian blur, whose standard deviation is uniform in 0.1 to 2 pixels.
      solarize: probability of solarisation from 128.
    """

    size: tuple[int, int]
    scale: tuple[float, float]
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    hflip: bool = True
    color_jitter: float = 0.4
    blur: float = 0.0
    solarize: float = 0.0


def random_view(
    key: PRNGKeyArray, image: Image, view: View
) -> UInt8[Array, "new_height new_width channels"]:
    """Crops, mirrors and recolours one image (Grill et al., arXiv 2006.07733, appendix B).

    In the paper's order: colour jitter, grayscale with probability 0.2, blur, solarisation. Its jitter also turns
    the hue by up to 0.1 and changes saturation half as much; this one has `color_jitter` for all three and no hue.
    """
    crop_key, flip_key, jitter_key, *keys = jax.random.split(key, 6)
    box = sample_box(crop_key, (image.shape[0], image.shape[1]), view.scale, view.ratio)
    cropped = resized_crop(image.astype(jnp.float32), box, view.size)
    if view.hflip:
        cropped = random_hflip(flip_key, cropped)
    levels: Array = jnp.clip(jnp.round(cropped), 0, 255).astype(jnp.uint8)

    def jitter(key: PRNGKeyArray, image: Array) -> Array:
        return simple.color_jitter(key, image, view.color_jitter)

    if view.color_jitter:
        levels = _sometimes(_JITTER_PROB, jitter_key, levels, jitter)
    levels = _sometimes(_GRAYSCALE_PROB, keys[0], levels, _grayscale)
    levels = _sometimes(view.blur, keys[1], levels, _blur)
    return _sometimes(view.solarize, keys[2], levels, _solarize)


def sample_box(
    key: PRNGKeyArray,
    size: tuple[int, int],
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> Box:
    """Draws top, left, height and width of a random resized crop in an image of `size` (height, width).

    As `cait_jax.data.decode.sample_box`: the area is uniform in `scale`, the width over the height log-uniform in
    `ratio`; if none of ten draws fits, it is the greatest centred box whose ratio is allowed.
    """
    height, width = size
    area_key, ratio_key, place_key = jax.random.split(key, 3)
    draws = (_ATTEMPTS,)
    areas = height * width * jax.random.uniform(area_key, draws, minval=scale[0], maxval=scale[1])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    ratios = jnp.exp(jax.random.uniform(ratio_key, draws, minval=low, maxval=high))
    sides = jnp.stack([jnp.sqrt(areas / ratios), jnp.sqrt(areas * ratios)], axis=1)
    boxes = jnp.round(sides).astype(jnp.int32)
    limits = jnp.array([[height, width]])
    fits = ((boxes > 0) & (boxes <= limits)).all(axis=1)
    box = boxes[jnp.argmax(fits)]
    room = jnp.maximum(limits[0] - box, 0)
    place = jax.random.randint(place_key, (2,), 0, room + 1)

    aspect = min(max(width / height, ratio[0]), ratio[1])
    most = max(1, min(height, round(width / aspect))), max(1, min(width, round(height * aspect)))
    centred = jnp.array([(height - most[0]) // 2, (width - most[1]) // 2, *most])
    return jnp.where(fits.any(), jnp.concatenate([place, box]), centred)


def resized_crop(
    image: Float[Array, "height width channels"], box: Box, size: tuple[int, int]
) -> Float[Array, "new_height new_width channels"]:
    """A box (top, left, height, width) of an image, resized to `size` by antialiased bicubic interpolation.

    As Pillow's `image.resize(size, BICUBIC, box)` before rounding: next to the box's edges pixels outside count.
    """
    top_left, sides = box[:2].astype(image.dtype), box[2:].astype(image.dtype)
    scale = jnp.asarray(size, image.dtype) / sides
    resized: Array = jax.image.scale_and_translate(
        image, (*size, image.shape[-1]), (0, 1), scale, -top_left * scale, "cubic", antialias=True
    )
    return resized


def _sometimes(
    prob: float, key: PRNGKeyArray, image: Image, change: Callable[[PRNGKeyArray, Image], Image]
) -> Image:
    """`change(key, image)` with a probability."""
    if not prob:
        return image
    drawn, key = jax.random.split(key)
    changed: Array = jax.lax.cond(
        jax.random.bernoulli(drawn, prob), change, lambda key, image: image, key, image
    )
    return changed


def _grayscale(key: PRNGKeyArray, image: Image) -> Image:
    del key
    return randaugment.grayscale(image)


def _blur(key: PRNGKeyArray, image: Image) -> Image:
    radius = jax.random.uniform(key, (), minval=_BLUR_RADIUS[0], maxval=_BLUR_RADIUS[1])
    return simple.gaussian_blur(image, radius)


def _solarize(key: PRNGKeyArray, image: Image) -> Image:
    del key
    return randaugment.solarize(image, _SOLARIZE_THRESHOLD)
