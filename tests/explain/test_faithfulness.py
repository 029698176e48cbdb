"""Deletion and insertion on a network that reads one known patch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import gaussian_filter1d

from cait_jax.explain import faithfulness
from cait_jax.models.cait import CaiT

PATCH, PATCHES = 4, 6  # the one that is read, of 2 x 3
CLASSES = jnp.array([1, 1])


class ReadsOnePatch(CaiT):
    """The logit of class 1 is the mean of patch 4, that of class 0 is 0."""

    def __call__(self, images, train=False, example_ids=None):
        mean = images[:, 16:32, 16:32].mean((1, 2, 3))
        return jnp.stack([0 * mean, mean], axis=-1)


MODEL = ReadsOnePatch(image_size=(32, 48), width=8, depth=1, num_heads=1, num_classes=2)
ONE_HOT = jnp.zeros((2, 2, 3)).at[:, 1, 1].set(1.0)


@pytest.fixture(scope="module")
def images():
    """The patch is bright, everything else dark."""
    return (
        jnp.full((2, 32, 48, 3), -1.0)
        .at[:, 16:32, 16:32]
        .set(jnp.array([3.0, 2.0])[:, None, None, None])
    )


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def test_curves_of_the_right_map_are_a_step(images):
    curves = faithfulness.deletion_insertion(MODEL, {}, images, CLASSES, ONE_HOT, steps=PATCHES)
    present, absent = sigmoid([3.0, 2.0]), 0.5
    expected = np.full((2, 7), absent)
    expected[:, 0] = present
    np.testing.assert_allclose(curves.deletion, expected, rtol=1e-6)
    np.testing.assert_allclose(
        curves.deletion_area, ((present + absent) / 2 + 5 * absent) / 6, rtol=1e-6
    )

    blurred = np.asarray(images, np.float64)
    for axis in (1, 2):
        blurred = gaussian_filter1d(blurred, 8.0, axis=axis, mode="nearest", radius=24)
    before = sigmoid(blurred[:, 16:32, 16:32].mean((1, 2, 3)))
    expected = np.repeat(present[:, None], 7, axis=1)
    expected[:, 0] = before
    np.testing.assert_allclose(curves.insertion, expected, rtol=1e-5)
    np.testing.assert_allclose(
        curves.insertion_area, ((before + present) / 2 + 5 * present) / 6, rtol=1e-5
    )


def test_the_rank_of_the_read_patch_is_the_area(images):
    """A map that ranks the patch k-th holds the curve up for k steps."""
    for rank in range(PATCHES):
        order = [p for p in range(PATCHES) if p != PATCH]
        order.insert(rank, PATCH)
        values = jnp.zeros(PATCHES).at[jnp.array(order)].set(-jnp.arange(6.0))
        maps = jnp.tile(values.reshape(1, 2, 3), (2, 1, 1))
        curves = faithfulness.deletion_insertion(MODEL, {}, images, CLASSES, maps, steps=PATCHES)
        present = sigmoid([3.0, 2.0])
        area = (rank * present + (present + 0.5) / 2 + (5 - rank) * 0.5) / 6
        np.testing.assert_allclose(curves.deletion_area, area, rtol=1e-6)


def test_the_right_method_wins(images):
    methods = ["input_gradient", "integrated_gradients"]
    found = faithfulness.compare(methods, MODEL, {}, images, CLASSES, steps=PATCHES)
    assert list(found) == [*methods, "random", "centre"]
    scores = faithfulness.summary({name: curves for name, (_, curves) in found.items()})
    best = faithfulness.deletion_insertion(MODEL, {}, images, CLASSES, ONE_HOT, steps=PATCHES)
    for method in methods:
        np.testing.assert_allclose(scores[method]["deletion"], best.deletion_area.mean(), rtol=1e-6)
        for other in ("random", "centre"):
            assert scores[method]["deletion"] < scores[other]["deletion"]
            assert scores[method]["insertion"] > scores[other]["insertion"]


def test_summary_is_mean_and_standard_error():
    curve = jnp.array([[0.0, 0.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    scores = faithfulness.summary({"m": faithfulness.Curves(curve, 1 - curve)})["m"]
    areas = np.array([0.0, 1.0, 0.5, 0.0])
    assert scores["deletion"] == pytest.approx(areas.mean())
    assert scores["insertion"] == pytest.approx(1 - areas.mean())
    assert scores["deletion_error"] == pytest.approx(areas.std(ddof=1) / 2)


def test_a_lead_is_measured_image_by_image():
    """Images that differ much and methods that differ by 0.1 in each: no error."""
    base = jnp.array([[0.1, 0.1], [0.5, 0.5], [0.8, 0.8]])
    curves = {
        "better": faithfulness.Curves(base - 0.1, base + 0.1),
        "centre": faithfulness.Curves(base, base),
    }
    (found,) = faithfulness.lead(curves).values()
    assert found["deletion"] == pytest.approx(0.1, rel=1e-5)
    assert found["insertion"] == pytest.approx(0.1, rel=1e-5)
    assert found["deletion_error"] == pytest.approx(0.0, abs=1e-6)
    assert faithfulness.summary(curves)["better"]["deletion_error"] > 0.1


def test_a_random_map_belongs_to_its_image():
    images = jax.random.normal(jax.random.key(0), (3, 32, 48, 3))
    maps = faithfulness.random_maps(images, (3, 2, 3), 0)
    alone = faithfulness.random_maps(images[2:], (1, 2, 3), 0)
    np.testing.assert_array_equal(maps[2:], alone)
    assert not np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps, faithfulness.random_maps(images, (3, 2, 3), 1))


def test_points_need_not_divide_the_patches(images):
    curves = faithfulness.deletion_insertion(MODEL, {}, images, CLASSES, ONE_HOT, steps=4)
    assert curves.deletion.shape == (2, 5)
    np.testing.assert_allclose(curves.insertion[:, -1], curves.deletion[:, 0], rtol=1e-6)


def test_several_kinds_of_maps_share_one_forward_pass(images):
    calls = []

    class Counts(ReadsOnePatch):
        def __call__(self, images, train=False, example_ids=None):
            calls.append(images.shape)
            return super().__call__(images, train, example_ids)

    model = Counts(**{name: getattr(MODEL, name) for name in ("image_size", "width", "depth")},
                   num_heads=1, num_classes=2)  # fmt: skip
    classes = jnp.array([[0, 1], [1, 0]])
    maps = jax.random.uniform(jax.random.key(0), (3, 2, 2, 3))
    together = jax.jit(
        lambda maps: faithfulness.deletion_insertion(model, {}, images, classes, maps, steps=4)
    )(maps)
    assert calls == [images.shape]
    assert together.deletion.shape == (3, 2, 2, 5)
    assert together.insertion_area.shape == (3, 2, 2)
    for kind in range(3):
        alone = faithfulness.deletion_insertion(MODEL, {}, images, classes, maps[kind], steps=4)
        np.testing.assert_allclose(together.deletion[kind], alone.deletion, rtol=1e-6)
        np.testing.assert_allclose(together.insertion[kind], alone.insertion, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.4, 5.0, 30.0])  # 30: a window wider than the image
def test_blur_is_a_gaussian_with_repeated_edges(sigma):
    images = np.random.default_rng(0).standard_normal((2, 32, 48, 3)).astype(np.float32)
    expected = images.astype(np.float64)
    for axis in (1, 2):
        expected = gaussian_filter1d(
            expected, sigma, axis=axis, mode="nearest", radius=max(1, int(3 * sigma))
        )
    np.testing.assert_allclose(faithfulness.blur(images, sigma), expected, rtol=1e-5, atol=1e-6)
