"""Colour jitter, and the three augmentations of DeiT III (Touvron et al., arXiv 2204.07118, section 3)."""

import jax
from jaxtyping import Array, PRNGKeyArray, UInt8

from cait_jax.data import pixels

Image = UInt8[Array, "height width channels"]

_BLUR_RADIUS = (0.1, 2.0)
_SOLARIZE_FROM = 128


def color_jitter(key: PRNGKeyArray, image: Image, strength: float) -> Image:
    """Changes brightness, contrast and saturation, in an order drawn at random, as torchvision does.

    Args:
      key: of this image.
      image: one image of 1 or 3 channels.
      strength: each factor is uniform from `max(0, 1 - strength)` to `1 + strength`.
    """
    order_key, factor_key = jax.random.split(key)
    order = jax.random.permutation(order_key, 3)
    low = max(0.0, 1.0 - strength)
    factors = jax.random.uniform(factor_key, (3,), minval=low, maxval=1.0 + strength)
    changes = (pixels.brightness, pixels.contrast, pixels.color)
    for i in range(3):
        image = jax.lax.switch(order[i], changes, image, factors[order[i]])
    return image


def three_augment(key: PRNGKeyArray, image: Image) -> Image:
    """Makes one image grey, or solarises it from 128 upwards, or blurs it, with equal chance.

    The standard deviation of the Gaussian blur is uniform from 0.1 to 2 pixels. DeiT III lets `color_jitter` of
    strength 0.3 follow.
    """
    which, how_much = jax.random.split(key)
    radius = jax.random.uniform(how_much, (), minval=_BLUR_RADIUS[0], maxval=_BLUR_RADIUS[1])
    branches = (
        pixels.grayscale,
        lambda image: pixels.solarize(image, _SOLARIZE_FROM),
        lambda image: pixels.gaussian_blur(image, radius),
    )
    return jax.lax.switch(jax.random.randint(which, (), 0, len(branches)), branches, image)
