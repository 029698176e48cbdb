"""Attention as maps over the image."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import cait_jax
from cait_jax import UserError, forward_intermediates
from cait_jax.explain import attention
from cait_jax.models.cait import CaiT
from cait_jax.weights.timm_names import from_timm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "cait_small.npz"
SIZES = {"image_size": (32, 48), "width": 16, "depth": 3, "num_heads": 2, "num_classes": 5}


def passed(**attributes):
    """A network with weights that matter, variables, and what a pass over two images recorded."""
    model = CaiT(**SIZES, layer_scale_init=1.0, **attributes)
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = model.init(jax.random.key(0), images)
    variables = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), variables
    )
    return model, forward_intermediates(model, variables, images)[1]


def test_mixed_weights_are_what_multiplies_the_values():
    """Weights times values, projected, are the attention's output that the published code recorded."""
    with np.load(FIXTURE) as file:
        recorded = dict(file)
    model = CaiT(
        image_size=(48, 80), width=96, depth=3, num_heads=4, num_classes=7, precision="highest"
    )
    weights = {n[len("weight/") :]: a for n, a in recorded.items() if n.startswith("weight/")}
    variables = from_timm(weights, model)
    _, inside = forward_intermediates(model, variables, recorded["image"])
    maps = {f"blocks.{i}": m for i, m in enumerate(attention.self_attention(model, inside))}
    of_class = attention.class_attention(model, inside)
    maps |= {f"blocks_token_only.{i}": m for i, m in enumerate(of_class)}
    assert len(maps) == 5
    for block, found in maps.items():
        x = recorded[f"stage/{block}.norm1"].astype(np.float64)
        if "token" in block:
            v = x @ weights[f"{block}.attn.v.weight"].T + weights[f"{block}.attn.v.bias"]
        else:
            v = (x @ weights[f"{block}.attn.qkv.weight"].T + weights[f"{block}.attn.qkv.bias"])[
                ..., 192:
            ]
        v = v.reshape(*v.shape[:2], 4, 24)
        out = np.einsum("bhqk,bkhd->bqhd", found, v).reshape(v.shape[0], -1, 96)
        out = out @ weights[f"{block}.attn.proj.weight"].T + weights[f"{block}.attn.proj.bias"]
        np.testing.assert_allclose(out, recorded[f"stage/{block}.attn"], rtol=1e-5, atol=1e-5)


def test_kinds_without_talking_heads_are_two():
    model, inside = passed(talking_heads=False)
    for mixed, plain in (("mixed_scores", "scores"), ("mixed_weights", "weights")):
        for a, b in zip(
            attention.all_attention(model, inside, mixed),
            attention.all_attention(model, inside, plain),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
    for weights in attention.all_attention(model, inside, "weights"):
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-6)


def test_weights_are_the_softmax_of_the_mixed_scores():
    model, inside = passed()
    for scores, weights in zip(
        attention.all_attention(model, inside, "mixed_scores"),
        attention.all_attention(model, inside, "weights"),
        strict=True,
    ):
        np.testing.assert_allclose(jax.nn.softmax(scores), weights, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("token", ["class_attention", "input", 1, "mean"])
def test_a_patch_reads_and_is_read(token):
    model, inside = passed(class_token=token)
    maps = attention.self_attention(model, inside)
    assert [m.shape[-1] for m in maps] == [6 + n for n in attention.special_tokens(model)]
    read, readers = (f(model, inside, 4) for f in (attention.read_by, attention.readers_of))
    assert read.shape == readers.shape == (3, 2, 2, 2, 3)
    special = attention.special_tokens(model)[2]
    np.testing.assert_array_equal(read[2, 0, 1, 0, 2], maps[2][0, 1, special + 4, special + 2])
    np.testing.assert_array_equal(readers[2, 0, 1, 0, 2], maps[2][0, 1, special + 2, special + 4])


@pytest.mark.parametrize(("token", "layers"), [("class_attention", 2), ("input", 3), (1, 2)])
def test_the_class_token_reads_patches(token, layers):
    model, inside = passed(class_token=token)
    maps = attention.class_token_maps(model, inside, "weights")
    assert maps.shape == (layers, 2, 2, 2, 3)
    last = attention.all_attention(model, inside, "weights")[-1]
    np.testing.assert_array_equal(maps[-1].reshape(2, 2, 6), last[:, :, 0, 1:])
    assert jnp.all(maps.sum((-2, -1)) < 1)


def test_token_names_count_special_tokens():
    model = cait_jax.create_model("deit_tiny_distilled", image_size=32)
    assert attention.token_names(model, 0) == [
        "class", "distillation", "0,0", "0,1", "1,0", "1,1",
    ]  # fmt: skip
    model = cait_jax.create_model("vit_tiny", image_size=(16, 32), registers=2)
    assert attention.token_names(model, 0) == ["class", "register 0", "register 1", "0,0", "0,1"]
    model = cait_jax.create_model("cait_xxs24", image_size=32, depth=2)
    assert attention.token_names(model, 1) == ["0,0", "0,1", "1,0", "1,1"]
    assert attention.token_names(model, 2)[0] == "class"


def test_bad_requests_name_what_there_is():
    model, inside = passed(class_token="mean")
    with pytest.raises(UserError, match="no class token"):
        attention.class_token_maps(model, inside)
    with pytest.raises(UserError, match=r"^mine has no class token .*: give another$"):
        attention.check_class_token(model, "mine", "give another")
    with pytest.raises(UserError, match="no patch 6: an image has 2 x 3, 0 to 5"):
        attention.read_by(model, inside, 6)
    with pytest.raises(UserError, match="no kind of attention map 'logits': scores, mixed_scores"):
        attention.self_attention(model, inside, "logits")
    with pytest.raises(UserError, match=r"^mine is a RegNetY, a convolutional network"):
        attention.check_class_token(cait_jax.create_model("regnety_160"), "mine")
