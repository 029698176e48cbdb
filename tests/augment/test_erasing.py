"""Random erasing: where, how large, with what."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.augment.pipeline import random_erase, sample_erasing_box

AREA, ASPECT = (0.02, 1 / 3), (0.3, 1 / 0.3)
erase = jax.jit(random_erase, static_argnums=3)


def boxes(size, count=3000, area=AREA, aspect=ASPECT):
    """Top, left, height and width of many draws, zeros where there is none."""
    one = functools.partial(sample_erasing_box, size=size, area=area, aspect=aspect)
    masks = np.asarray(jax.vmap(one)(jax.random.split(jax.random.key(0), count)))
    rows, columns = masks.any(2), masks.any(1)
    height, width = rows.sum(1), columns.sum(1)
    np.testing.assert_array_equal(masks.sum((1, 2)), height * width)  # a box, and no other shape
    return rows.argmax(1), columns.argmax(1), height, width


def test_boxes_follow_area_and_aspect():
    top, left, height, width = boxes((60, 40))
    area, aspect = height * width / 2400, height / width
    assert 0.015 < area.min() < 0.03
    assert 0.32 < area.max() < 0.35
    # Boxes of a tenth always fit, so there the draw itself shows.
    small = area < 0.1
    assert abs(np.log(aspect[small]).mean()) < 0.06
    assert abs(np.log(aspect[small]).std() - np.log(1 / 0.09) / 12**0.5) < 0.05
    assert 0.25 < aspect.min() < 0.36
    assert 2.8 < aspect.max() < 4
    assert abs((top / (60 - height)).mean() - 0.5) < 0.04
    assert abs((left / (40 - width)).mean() - 0.5) < 0.04
    assert (top + height).max() == 60
    assert (left + width).max() == 40


def test_a_box_that_never_fits_erases_nothing():
    assert not np.any(boxes((8, 8), 50, area=(1.0, 1.1))[2])


def test_a_quarter_of_the_images_get_noise_of_their_own():
    images = jnp.full((400, 12, 10, 3), 7.0)
    key, ids = jax.random.key(1), jnp.arange(400)
    erased = np.asarray(erase(key, images, ids, 0.25))
    inside = (erased != 7.0).any(-1)
    happened = inside.any((1, 2))
    assert abs(happened.mean() - 0.25) < 6 * 0.43 / 20
    noise = erased[inside]
    assert abs(noise.mean()) < 6 / noise.size**0.5
    assert abs(noise.std() - 1) < 6 / noise.size**0.5
    assert len(np.unique(noise)) > 0.99 * noise.size
    order = jnp.arange(400)[::-1]
    np.testing.assert_array_equal(erase(key, images, ids[order], 0.25), erased[::-1])
    assert random_erase(key, images, ids, 0.0) is images
