"""Operations on 8-bit images against Pillow's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cait_jax.augment import randaugment, simple


def picture(seed=0, channels=3):
    """A ramp with noise, so that neither histograms nor neighbours are trivial."""
    rng = np.random.default_rng(seed)
    down, across = np.mgrid[:17, :23]
    ramp = np.stack([40 + 6 * across, 200 - 7 * down, 60 + 4 * down + 3 * across], -1)
    levels = np.clip(ramp + rng.normal(0, 12, ramp.shape), 5, 240).astype(np.uint8)
    return levels[..., :channels]


def opened(levels):
    return Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0])


def same(found, image, tolerance=0):
    expected = np.asarray(image).reshape(found.shape)
    assert found.dtype == jnp.uint8
    difference = np.abs(np.asarray(found).astype(int) - expected)
    assert difference.max() <= tolerance
    return (difference > 0).mean()


@pytest.mark.parametrize("channels", [1, 3])
def test_operations_on_histograms(channels):
    levels = picture(channels=channels)
    flat = np.full((5, 6, channels), 9, np.uint8)
    two = np.where(picture(1, channels) > 100, 255, 7).astype(np.uint8)
    for image in (levels, flat, two):
        same(randaugment.equalize(jnp.asarray(image)), ImageOps.equalize(opened(image)))
        # Pillow's quotient may fall just short of the integer that it is.
        assert (
            same(
                randaugment.auto_contrast(jnp.asarray(image)),
                ImageOps.autocontrast(opened(image)),
                1,
            )
            < 0.02
        )
        same(randaugment.invert(jnp.asarray(image)), ImageOps.invert(opened(image)))
    stretched = np.asarray(randaugment.auto_contrast(jnp.asarray(levels)))
    exact = (levels.astype(int) - levels.min((0, 1))) * 255 // np.ptp(levels.astype(int), (0, 1))
    np.testing.assert_array_equal(stretched, exact)


def test_operations_on_levels():
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=-1)
    for bits in range(1, 9):
        same(randaugment.posterize(jnp.asarray(ramp), bits), ImageOps.posterize(opened(ramp), bits))
    assert not randaugment.posterize(jnp.asarray(ramp), 0).any()
    for threshold in (0, 26, 128, 255, 256):
        same(
            randaugment.solarize(jnp.asarray(ramp), threshold),
            ImageOps.solarize(opened(ramp), threshold),
        )
    for addend in (0, 99, 110, 128):
        table = [min(255, i + addend) if i < 128 else i for i in range(256)] * 3
        same(randaugment.solarize_add(jnp.asarray(ramp), addend), opened(ramp).point(table))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("factor", [0.0, 0.19, 1.0, 1.81])
def test_enhancements(channels, factor):
    levels = picture(2, channels)
    pairs = (
        (randaugment.brightness, ImageEnhance.Brightness),
        (randaugment.contrast, ImageEnhance.Contrast),
        (randaugment.color, ImageEnhance.Color),
        (randaugment.sharpness, ImageEnhance.Sharpness),
    )
    for operation, enhance in pairs:
        same(operation(jnp.asarray(levels), factor), enhance(opened(levels)).enhance(factor))


def test_grayscale():
    levels = picture(3)
    same(randaugment.grayscale(jnp.asarray(levels)), opened(levels).convert("L").convert("RGB"))


def test_gaussian_blur():
    levels = picture(4)
    blur = jax.jit(simple.gaussian_blur)
    for radius in (0.0, 0.1, 0.7, 1.0, 1.414, 1.42, 2.0, 2.4):
        same(
            blur(jnp.asarray(levels), radius),
            opened(levels).filter(ImageFilter.GaussianBlur(radius)),
            1,
        )
    assert (
        same(
            blur(jnp.asarray(levels), 1.3), opened(levels).filter(ImageFilter.GaussianBlur(1.3)), 1
        )
        < 0.01
    )
