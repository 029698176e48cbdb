"""Positions are resized as PyTorch does it, and patch kernels so that tokens stay."""

from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model
from cait_jax.weights.adapt import adapt_input, resize_patch_embed, resize_pos_embed
from cait_jax.weights.timm_names import to_timm

# Recorded from torch 2.13.0: keys "HxW-HxW/input", ".../bicubic", ".../bicubic_antialias".
RECORDED = np.load(Path(__file__).parents[1] / "fixtures" / "pos_embed.npz")
GRIDS = sorted({key.split("/")[0] for key in RECORDED})


def grids_of(key):
    return [tuple(int(side) for side in grid.split("x")) for grid in key.split("-")]


@pytest.mark.parametrize("key", GRIDS)
def test_positions_equal_those_of_pytorch(key):
    old, new = grids_of(key)
    for antialias, kind in ((False, "bicubic"), (True, "bicubic_antialias")):
        found = resize_pos_embed(RECORDED[f"{key}/input"], old, new, antialias=antialias)
        np.testing.assert_allclose(found, RECORDED[f"{key}/{kind}"], rtol=0, atol=1e-5)


def test_prefix_tokens_and_dtype_stay():
    key = "3x5-6x4"
    old, new = grids_of(key)
    prefix = np.full((1, 2, 48), 7, np.float32)
    positions = np.concatenate([prefix, RECORDED[f"{key}/input"]], axis=1)
    found = resize_pos_embed(positions, old, new, num_prefix_tokens=2)
    np.testing.assert_array_equal(found[:, :2], prefix)
    np.testing.assert_allclose(found[:, 2:], RECORDED[f"{key}/bicubic"], rtol=0, atol=1e-5)
    half = resize_pos_embed(positions.astype(ml_dtypes.bfloat16), old, new, num_prefix_tokens=2)
    assert half.dtype == ml_dtypes.bfloat16
    with pytest.raises(UserError, match="17 positions is not one of 3 by 5 patches and 0 prefix"):
        resize_pos_embed(positions, old, new)


def resized_patches(patches, new):
    """Patches (n, old, old, c) resized as an image is."""
    shape = (len(patches), new, new, patches.shape[-1])
    return np.asarray(jax.image.resize(patches, shape, "cubic", antialias=True))


def test_a_larger_kernel_gives_enlarged_patches_the_same_tokens():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 4, 3, 5), np.float32)
    patches = rng.standard_normal((6, 4, 4, 3), np.float32)
    for new in (6, 8):
        larger = resize_patch_embed(kernel, new)
        assert larger.shape == (new, new, 3, 5)
        np.testing.assert_allclose(
            np.einsum("nijc,ijcd->nd", resized_patches(patches, new), larger),
            np.einsum("nijc,ijcd->nd", patches, kernel),
            atol=1e-4,
        )


def test_a_smaller_kernel_is_the_best_there_is():
    """Its tokens of shrunken patches differ from the old ones by what no kernel could mend."""
    rng = np.random.default_rng(1)
    kernel = rng.standard_normal((6, 6, 1, 2), np.float32)
    basis = np.eye(36, dtype=np.float32).reshape(36, 6, 6, 1)
    shrunk = resized_patches(basis, 4).reshape(36, 16)
    smaller = resize_patch_embed(kernel, 4).reshape(16, 2)
    residual = shrunk @ smaller - kernel.reshape(36, 2)
    np.testing.assert_allclose(shrunk.T @ residual, 0, atol=1e-4)
    assert np.abs(residual).max() > 0.1


def test_the_same_size_changes_no_bit():
    kernel = np.random.default_rng(0).standard_normal((4, 4, 3, 5), np.float32)
    assert resize_patch_embed(kernel, 4) is kernel
    positions = RECORDED["8x8-12x12/input"]
    assert resize_pos_embed(positions, (8, 8), (8, 8)) is positions


@pytest.fixture(scope="module")
def model():
    return create_model("cait_nano4_patch4_8", depth=1, num_classes=3, image_size=16)


@pytest.fixture(scope="module")
def weights(model):
    return to_timm({"params": random_params(model)})


def test_only_what_has_another_size_is_touched(model, weights):
    for changes in ({"image_size": (24, 8)}, {"patch_size": 2}, {"patch_size": 8}):
        other = model.clone(**changes)
        fitted = adapt_input(weights, other)
        template = to_timm({"params": random_params(other)})
        assert {k: v.shape for k, v in fitted.items()} == {k: v.shape for k, v in template.items()}
        for name, array in weights.items():
            if name not in ("pos_embed", "patch_embed.proj.weight"):
                assert fitted[name] is array
    same = adapt_input(weights, model)
    assert all(same[name].tobytes() == array.tobytes() for name, array in weights.items())


def test_the_shape_of_the_old_grid_is_given_or_square_or_asked_for(model, weights):
    wide = {**weights, "pos_embed": weights["pos_embed"][:, :8]}
    fitted = adapt_input(wide, model, image_size=(8, 16))
    expected = resize_pos_embed(wide["pos_embed"], (2, 4), (4, 4))
    np.testing.assert_array_equal(fitted["pos_embed"], expected)
    for image_size, sentence in (
        (None, r"8 patches, which could be .* give weights_image_size=\(height, width\)"),
        ((16, 16), r"8 patches of 4 by 4 pixels, not for 16 by 16 .* weights_image_size"),
    ):
        with pytest.raises(UserError, match=sentence):
            adapt_input(wide, model, image_size=image_size)
    # As many patches, in another shape: the square they may be from is not taken for granted.
    with pytest.raises(UserError, match="16 patches, which could be cut from more than one"):
        adapt_input(weights, model.clone(image_size=(8, 32)))
    same_shape = model.clone(image_size=(8, 16))
    np.testing.assert_array_equal(adapt_input(wide, same_shape)["pos_embed"], wide["pos_embed"])


def test_tokens_of_a_prefix_are_counted_from_the_model():
    vit = create_model("vit_6x256", depth=1, width=32, num_heads=2, image_size=16, patch_size=4)
    rng = np.random.default_rng(0)
    weights = {
        "pos_embed": rng.standard_normal((1, 1 + 9, 32), np.float32),
        "patch_embed.proj.weight": rng.standard_normal((32, 3, 4, 4), np.float32),
    }
    fitted = adapt_input(weights, vit)["pos_embed"]
    np.testing.assert_array_equal(fitted[:, 0], weights["pos_embed"][:, 0])
    expected = resize_pos_embed(weights["pos_embed"][:, 1:], (3, 3), (4, 4))
    np.testing.assert_array_equal(fitted[:, 1:], expected)


def test_a_network_without_positions_takes_any_image():
    weights = {"stem.conv.weight": np.ones((8, 3, 3, 3), np.float32)}
    assert adapt_input(weights, create_model("regnety_160")) == weights


def test_a_grid_is_resized_in_single_precision_whatever_the_default():
    positions = RECORDED["8x8-12x12/input"]
    with jax.default_matmul_precision("bfloat16"):
        found = resize_pos_embed(jnp.asarray(positions), (8, 8), (12, 12))
    np.testing.assert_allclose(found, RECORDED["8x8-12x12/bicubic"], rtol=0, atol=1e-5)
