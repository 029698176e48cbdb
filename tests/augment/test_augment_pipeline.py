"""Augmentation in the step: each operation against a formula or an independent implementation."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from scipy import ndimage

from cait_jax.augment.pipeline import Augmentation, augment, normalise, random_hflip
from cait_jax.augment.randaugment import RandAugment
from cait_jax.augment.simple import affine, random_pad_crop
from cait_jax.sharding import batch_sharding, make_mesh, replicated

ALL = Augmentation(hflip=True, pad_crop=2, rotate=15.0, zoom=0.1, shear=0.1, translate=0.1)


def images(batch=4, size=(9, 7), channels=3):
    return jax.random.uniform(jax.random.key(0), (batch, *size, channels), maxval=255.0)


def test_normalise_is_the_formula():
    pixels = jnp.arange(2 * 2 * 2 * 3, dtype=jnp.uint8).reshape(2, 2, 2, 3) * 10
    out = normalise(pixels, (0.1, 0.2, 0.3), (0.5, 0.25, 0.125))
    expected = (np.asarray(pixels) / 255.0 - [0.1, 0.2, 0.3]) / [0.5, 0.25, 0.125]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6)
    assert out.dtype == jnp.float32


@pytest.mark.parametrize(
    ("angle", "scale", "shear", "shift"),
    [
        (0.3, 1.0, 0.0, (0, 0)),
        (0.0, 1.3, 0.0, (0, 0)),
        (0.0, 1.0, 0.4, (0, 0)),
        (-0.2, 0.9, 0.2, (1.5, -2)),
    ],
)
def test_affine_agrees_with_scipy(angle, scale, shear, shift):
    image = images(1, channels=1)[0]
    found = affine(
        image, angle=angle, scale=scale, shear=shear, shift=jnp.array(shift, jnp.float32)
    )
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    inverse = np.linalg.inv(scale * rotation @ np.array([[1, 0], [-shear, 1]]))
    centre = (np.array(image.shape[:2]) - 1) / 2
    # Outside, scipy's grid mode extends by zeros as ours does.
    expected = ndimage.affine_transform(
        np.pad(np.asarray(image[..., 0], np.float64), 20),
        inverse,
        centre + 20 - inverse @ (centre + 20 + np.array(shift)),
        order=1,
    )[20:-20, 20:-20]
    np.testing.assert_allclose(found[..., 0], expected, rtol=0, atol=1e-2)


def test_affine_turns_counter_clockwise_and_moves_down_and_right():
    image = jnp.zeros((5, 5, 1)).at[0, 2].set(1.0)
    turned = affine(image, angle=jnp.pi / 2)
    assert np.unravel_index(np.argmax(turned[..., 0]), (5, 5)) == (2, 0)
    moved = affine(image, shift=(1.0, 2.0))
    assert np.unravel_index(np.argmax(moved[..., 0]), (5, 5)) == (1, 4)
    np.testing.assert_array_equal(affine(image), image)


def test_flip_mirrors_half_of_the_images():
    image = images(1)[0]
    flipped = jax.vmap(lambda key: random_hflip(key, image))(
        jax.random.split(jax.random.key(1), 400)
    )
    mirrored = np.array([np.array_equal(one, image[:, ::-1]) for one in flipped])
    same = np.array([np.array_equal(one, image) for one in flipped])
    assert (mirrored ^ same).all()
    assert abs(mirrored.mean() - 0.5) < 6 * 0.5 / 20


def test_pad_crop_reaches_every_offset_evenly():
    image = jnp.arange(1.0, 17.0).reshape(4, 4, 1)
    crops = jax.vmap(lambda key: random_pad_crop(key, image, 1))(
        jax.random.split(jax.random.key(1), 900)
    )
    padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
    counts = [
        sum(np.array_equal(padded[i : i + 4, j : j + 4], crop) for crop in crops)
        for i in range(3)
        for j in range(3)
    ]
    assert sum(counts) == 900
    assert min(counts) > 100 - 6 * 10 and max(counts) < 100 + 6 * 10  # noqa: PT018


@pytest.mark.slow
def test_an_images_draws_depend_on_its_position_only():
    batch = images(6)
    key = jax.random.key(3)
    whole = augment(key, batch, jnp.arange(6), ALL)
    rows = jnp.array([4, 1])
    part = augment(key, batch[rows], rows, ALL)
    np.testing.assert_allclose(part, whole[rows], rtol=0, atol=1e-3)
    again = augment(key, jnp.stack([batch[0]] * 2), jnp.array([0, 1]), ALL)
    assert not np.allclose(again[0], again[1])


def test_nothing_asked_for_changes_nothing():
    batch = images()
    assert augment(jax.random.key(0), batch, jnp.arange(4), Augmentation()) is batch


def test_limits_are_kept():
    """A dot at the centre of the image moves by no more than the settings allow."""
    image = jnp.zeros((64, 1 * 21, 21, 1)).at[:, 10, 10].set(1.0)
    moved = augment(
        jax.random.key(2), image, jnp.arange(64), Augmentation(translate=0.1, rotate=30.0, zoom=0.2)
    )
    mass = np.asarray(moved[..., 0])
    grid = np.arange(21.0)
    total = mass.sum((1, 2))
    down = (mass.sum(2) @ grid) / total - 10
    right = (mass.sum(1) @ grid) / total - 10
    for offset in (down, right):
        assert np.abs(offset).max() < 2.1 + 0.5
        assert np.abs(offset).max() > 1.0


RECIPE = Augmentation(hflip=True, rand_augment=RandAugment())
DEIT3 = Augmentation(hflip=True, three_augment=True, color_jitter=0.3)


@pytest.mark.parametrize("settings", [slow(RECIPE), DEIT3])
def test_recipes_are_the_same_on_one_device_and_eight(settings):
    batch, ids, key = jnp.round(images(16)), jnp.arange(16), jax.random.key(5)
    one = jax.jit(augment, static_argnums=3)(key, batch, ids, settings)
    mesh = make_mesh()
    rows = batch_sharding(mesh)
    sharded = jax.jit(
        functools.partial(augment, settings=settings),
        in_shardings=(replicated(mesh), rows, rows),
        out_shardings=rows,
    )
    eight = sharded(key, jax.device_put(batch, rows), jax.device_put(ids, rows))
    assert len(eight.sharding.device_set) == 8
    np.testing.assert_array_equal(eight, one)
    assert one.dtype == batch.dtype
    np.testing.assert_array_equal(one, np.round(one))
    assert not np.array_equal(one, batch)


@pytest.mark.slow
def test_recipes_flip_as_their_flip_alone():
    """New draws leave those that were there before as they are."""
    batch, ids, key = jnp.round(images(32)), jnp.arange(32), jax.random.key(5)
    never = dataclasses.replace(RECIPE, rand_augment=RandAugment(prob=0.0))
    flipped = augment(key, batch, ids, Augmentation(hflip=True))
    np.testing.assert_array_equal(augment(key, batch, ids, never), flipped)
