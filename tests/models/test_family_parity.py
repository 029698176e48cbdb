"""A small distilled DeiT and a small RegNetY against recorded numbers of the published code."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax import forward_intermediates
from cait_jax.models.regnet import RegNetY
from cait_jax.models.vit import VisionTransformer
from cait_jax.weights.timm_names import from_timm, to_timm

FIXTURES = Path(__file__).parents[1] / "fixtures"
TOLERANCE = 1e-5


def recorded(name):
    with np.load(FIXTURES / name) as file:
        arrays = dict(file)
    weights = {
        name.removeprefix("weight/"): a for name, a in arrays.items() if name.startswith("weight/")
    }
    return arrays, weights


def deit(**overrides):
    attributes = {"distilled": True, "num_classes": 7, "precision": "highest", **overrides}
    return VisionTransformer(image_size=(48, 80), width=96, depth=3, num_heads=4, **attributes)


REGNET = RegNetY(
    image_size=(64, 96), w0=24, wa=24.0, wm=2.0, depth=9, group_width=8, num_classes=7,
    precision="highest",
)  # fmt: skip


@pytest.mark.parametrize("stacked", [True, False])
def test_distilled_deit_agrees_in_both_heads_and_their_mean(stacked):
    arrays, weights = recorded("deit_distilled_small.npz")
    model = deit(stacked=stacked)
    variables = from_timm(weights, model)
    logits, inside = forward_intermediates(model, variables, arrays["image"])
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=TOLERANCE)
    for ours, theirs in (
        ("logits_class", "logits_class"),
        ("logits_distillation", "logits_distillation"),
    ):
        np.testing.assert_allclose(inside[ours], arrays[theirs], rtol=0, atol=TOLERANCE)
    assert np.abs(arrays["logits_class"] - arrays["logits_distillation"]).max() > 0.1
    back = to_timm(variables)
    assert set(back) == set(weights)
    assert all(np.array_equal(back[name], weights[name]) for name in weights)


def test_the_tokens_are_not_interchangeable():
    """The comparison would notice the two tokens, or the two heads, swapped."""
    arrays, weights = recorded("deit_distilled_small.npz")
    model = deit()
    for a, b in (("cls_token", "dist_token"), ("head.weight", "head_dist.weight")):
        swapped = weights | {a: weights[b], b: weights[a]}
        logits = model.apply(from_timm(swapped, model), arrays["image"])
        assert np.abs(logits - arrays["logits"]).max() > 100 * TOLERANCE


def test_features_of_a_distilled_network_are_the_mean_of_both_tokens():
    arrays, weights = recorded("deit_distilled_small.npz")
    headless = {name: a for name, a in weights.items() if not name.startswith("head")}
    model = deit(num_classes=0)
    features = model.apply(from_timm(headless, model), arrays["image"])
    _, inside = forward_intermediates(deit(), from_timm(weights, deit()), arrays["image"])
    np.testing.assert_array_equal(features, inside["features"])


def test_regnety_agrees_in_every_stage():
    arrays, weights = recorded("regnety_small.npz")
    variables = from_timm(weights, REGNET)
    logits, inside = forward_intermediates(REGNET, variables, arrays["image"])
    np.testing.assert_allclose(logits, arrays["logits"], rtol=0, atol=TOLERANCE)
    assert len(inside["stages"]) == 4
    for i, stage in enumerate(inside["stages"], start=1):
        theirs = arrays[f"stage/s{i}"].transpose(0, 2, 3, 1)
        np.testing.assert_allclose(stage, theirs, rtol=0, atol=TOLERANCE, err_msg=f"s{i}")
    back = to_timm(variables)
    assert set(back) == set(weights)
    for name, array in weights.items():
        assert name.endswith("num_batches_tracked") or np.array_equal(back[name], array), name


@pytest.mark.slow
def test_regnety_in_training_normalises_by_the_batch_and_moves_its_averages():
    arrays, weights = recorded("regnety_small.npz")
    variables = from_timm(weights, REGNET)
    logits, moved = REGNET.apply(variables, arrays["image"], train=True, mutable=["batch_stats"])
    assert np.abs(logits - arrays["logits"]).max() > 0.01
    before = variables["batch_stats"]["stem"]["bn"]["mean"]
    after = moved["batch_stats"]["stem"]["bn"]["mean"]
    kernel = variables["params"]["stem"]["conv"]["kernel"]
    padded = np.pad(arrays["image"], ((0, 0), (1, 1), (1, 1), (0, 0)))
    patches = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))[:, ::2, ::2]
    stem = np.einsum("bhwcij,ijco->bhwo", patches, np.asarray(kernel))
    expected = 0.9 * before + 0.1 * jnp.asarray(stem.mean((0, 1, 2)))
    np.testing.assert_allclose(after, expected, rtol=0, atol=1e-5)
