"""Colour jitter and the three augmentations of DeiT III against Pillow."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from cait_jax.augment.simple import color_jitter, three_augment

PICTURE = np.random.default_rng(0).integers(20, 236, (9, 11, 3), dtype=np.uint8)


def test_color_jitter_is_three_enhancements_in_any_order():
    count, strength = 60, 0.3
    keys = jax.random.split(jax.random.key(0), count)
    results = jax.jit(jax.vmap(functools.partial(color_jitter, strength=strength), (0, None)))(
        keys, PICTURE
    )
    factor_keys = jax.vmap(jax.random.split)(keys)[:, 1]
    factors = jax.vmap(lambda key: jax.random.uniform(key, (3,), minval=0.7, maxval=1.3))(
        factor_keys
    )
    enhancements = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    found = set()
    for result, drawn in zip(np.asarray(results), np.asarray(factors), strict=True):
        fits = []
        for order in itertools.permutations(range(3)):
            image = Image.fromarray(PICTURE)
            for i in order:
                image = enhancements[i](image).enhance(float(drawn[i]))
            if np.abs(np.asarray(image).astype(int) - result).max() <= 1:
                fits.append(order)
        assert fits
        if len(fits) == 1:
            found.add(fits[0])
    assert len(found) == 6


def test_factors_are_never_negative():
    black = color_jitter(jax.random.key(0), jnp.zeros((4, 4, 3), jnp.uint8), 2.0)
    assert not black.any()
    bright = jax.vmap(lambda key: color_jitter(key, jnp.full((1, 1, 1), 10, jnp.uint8), 4.0))(
        jax.random.split(jax.random.key(0), 300)
    )
    assert 0 <= bright.min() < 2
    assert 45 <= bright.max() <= 50


def test_three_augment_is_one_of_three():
    count = 300
    results = np.asarray(
        jax.jit(jax.vmap(three_augment, (0, None)))(
            jax.random.split(jax.random.key(0), count), PICTURE
        )
    )
    image = Image.fromarray(PICTURE)
    grey = (results == np.asarray(image.convert("L").convert("RGB"))).all((1, 2, 3))
    solarized = (results == np.asarray(ImageOps.solarize(image, 128))).all((1, 2, 3))
    blurred = results[~(grey | solarized)].astype(int)
    for kind in (grey.sum(), solarized.sum(), len(blurred)):
        assert abs(kind - 100) < 6 * 67**0.5
    spread = blurred.std((1, 2)).mean(-1)
    softest, hardest = (
        np.asarray(image.filter(ImageFilter.GaussianBlur(radius))).std((0, 1)).mean()
        for radius in (0.1, 2.0)
    )
    assert hardest - 1 < spread.min() < hardest + 2
    assert softest - 2 < spread.max() < softest + 1
