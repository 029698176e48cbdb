"""Random resized crops against Pillow and the host's, and the views made of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageOps

from cait_jax.augment.crops import View, random_view, resized_crop, sample_box
from cait_jax.data.decode import sample_box as sample_box_on_host

PICTURE = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
SCALE, RATIO = (0.2, 0.5), (3 / 4, 4 / 3)


@pytest.mark.parametrize(
    ("box", "size"),
    [((3, 5, 12, 8), (6, 6)), ((0, 0, 20, 30), (9, 14)), ((4, 7, 5, 6), (16, 12)), ((19, 29, 1, 1), (3, 3))],
)  # fmt: skip
def test_a_crop_is_pillows_resize_of_a_box(box, size):
    top, left, height, width = box
    edges = (left, top, left + width, top + height)
    found = resized_crop(jnp.asarray(PICTURE, jnp.float32), jnp.array(box), size)
    for channel in range(3):  # of floats, which Pillow does not round on the way
        picture = Image.fromarray(PICTURE[..., channel].astype(np.float32), "F")
        expected = picture.resize(size[::-1], Image.Resampling.BICUBIC, box=edges)
        np.testing.assert_allclose(found[..., channel], np.asarray(expected), atol=2e-2)


def test_a_crop_of_the_whole_at_its_size_is_the_image():
    found = resized_crop(jnp.asarray(PICTURE, jnp.float32), jnp.array([0, 0, 20, 30]), (20, 30))
    np.testing.assert_allclose(found, PICTURE, atol=1e-3)


def boxes_of(size, scale, ratio, count=4000):
    keys = jax.random.split(jax.random.key(0), count)
    draw = functools.partial(sample_box, size=size, scale=scale, ratio=ratio)
    return np.asarray(jax.jit(jax.vmap(draw))(keys))


@pytest.mark.parametrize("scale", [SCALE, (0.7, 1.0)])
def test_boxes_lie_inside_and_are_distributed_as_the_hosts(scale):
    size = (40, 60)
    found = boxes_of(size, scale, RATIO)
    top, left, height, width = found.T
    assert (found[:, :2] >= 0).all()
    assert (found[:, 2:] >= 1).all()
    assert (top + height <= size[0]).all()
    assert (left + width <= size[1]).all()
    rng = np.random.default_rng(0)
    host = np.array([sample_box_on_host(rng, size, scale=scale, ratio=RATIO) for _ in range(4000)])
    for mine, theirs in zip(found.T, host.T, strict=True):
        error = 4 * theirs.std() * np.sqrt(2 / 4000)
        assert abs(mine.mean() - theirs.mean()) < error
        np.testing.assert_allclose(mine.std(), theirs.std(), rtol=0.1)


def test_a_box_that_never_fits_is_the_greatest_centred_one():
    found = boxes_of((10, 40), (0.9, 1.0), (1.0, 1.0), count=3)
    expected = sample_box_on_host(
        np.random.default_rng(0), (10, 40), scale=(0.9, 1.0), ratio=(1.0, 1.0)
    )
    np.testing.assert_array_equal(found, [expected] * 3)  # (0, 15, 10, 10)


def views(view, count=400):
    keys = jax.random.split(jax.random.key(1), count)
    draw = jax.jit(
        functools.partial(jax.lax.map, lambda key: random_view(key, jnp.asarray(PICTURE), view))
    )
    return np.asarray(draw(keys)).astype(int)


WHOLE = {"size": (20, 30), "scale": (1.0, 1.0), "ratio": (1.5, 1.5)}


def share(found, expected, tolerance=0):
    return np.mean([np.abs(one - expected).max() <= tolerance for one in found])


def test_half_of_the_views_are_mirrored_and_a_fifth_gray():
    found = views(View(**WHOLE, color_jitter=0.0))
    gray = np.asarray(ImageOps.grayscale(Image.fromarray(PICTURE)).convert("RGB")).astype(int)
    shares = {
        "same": share(found, PICTURE), "mirrored": share(found, PICTURE[:, ::-1]),
        "gray": share(found, gray, 1), "gray, mirrored": share(found, gray[:, ::-1], 1),
    }  # fmt: skip
    assert sum(shares.values()) == pytest.approx(1)
    expected = {"same": 0.4, "mirrored": 0.4, "gray": 0.1, "gray, mirrored": 0.1}
    assert shares == pytest.approx(expected, abs=0.08)


def test_jitter_blur_and_solarisation_have_their_probabilities():
    plain = {**WHOLE, "hflip": False}
    jittered = views(View(**plain, color_jitter=0.4))
    assert share(jittered, PICTURE) == pytest.approx(0.2 * 0.8, abs=0.06)
    solarized = views(View(**plain, color_jitter=0.0, solarize=0.3))
    inverted = np.where(PICTURE < 128, PICTURE, 255 - PICTURE)
    assert share(solarized, inverted) == pytest.approx(0.3 * 0.8, abs=0.06)
    blurred = views(View(**plain, color_jitter=0.0, blur=0.5))
    smooth = np.mean([one.std() < 0.9 * PICTURE.std() for one in blurred])
    assert 0.35 < smooth < 0.65
    assert share(blurred, PICTURE) > 0.25
