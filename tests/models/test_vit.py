"""What ViT's relatives add: registers, tokens without positions, the mean patch, gated MLPs.

That each released name computes what timm does is held by benchmarks/export_to_timm.py.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model, forward_intermediates
from cait_jax.models.cait import Mlp
from cait_jax.models.vit import VisionTransformer
from cait_jax.weights.timm_names import from_timm, to_timm

SIZES = {"image_size": (16, 24), "patch_size": 8, "width": 12, "depth": 2, "num_heads": 2}
IMAGES = jax.random.normal(jax.random.key(1), (3, 16, 24, 3))
PATCHES = 6
OPTIONS = [
    {"class_position": False},
    {"registers": 3},
    {"registers": 3, "class_position": False, "residual": "layerscale"},
    {"mean_pool": True},
    {"mean_pool": True, "registers": 2},
    {"swiglu": True},
]


def vit(**attributes):
    model = VisionTransformer(**SIZES, num_classes=5, precision="highest", **attributes)
    return model, random_params(model)


def logits(model, params):
    return np.asarray(model.apply({"params": params}, IMAGES))


def test_without_class_position_is_a_position_of_zero():
    model, params = vit(class_position=False)
    assert params["pos_embed"].shape == (1, PATCHES, 12)
    placed = jnp.concatenate([jnp.zeros((1, 1, 12)), params["pos_embed"]], axis=1)
    with_position = model.clone(class_position=True)
    expected = logits(with_position, {**params, "pos_embed": placed})
    np.testing.assert_array_equal(logits(model, params), expected)
    changed = {**params, "pos_embed": params["pos_embed"].at[0, 2, 0].add(0.5)}
    assert np.abs(logits(model, changed) - expected).max() > 1e-2


def test_registers_are_read_by_patches_and_by_no_head():
    """They are a set: their order changes nothing. They change the logits through attention alone."""
    model, params = vit(registers=3, class_position=False)
    assert params["reg_token"].shape == (1, 3, 12)
    before = logits(model, params)
    turned = {**params, "reg_token": params["reg_token"][:, ::-1]}
    np.testing.assert_allclose(logits(model, turned), before, rtol=0, atol=1e-5)
    other = {**params, "reg_token": -params["reg_token"]}
    assert np.abs(logits(model, other) - before).max() > 1e-2
    # Where attention gives nothing (its projection is 0), the logits know nothing of registers.
    projection = params["blocks"]["attn"]["proj"]
    silent = jax.tree.map(jnp.zeros_like, projection)
    blocks = {**params["blocks"], "attn": {**params["blocks"]["attn"], "proj": silent}}
    without = VisionTransformer(**SIZES, num_classes=5, precision="highest", class_position=False)
    rest = {name: value for name, value in params.items() if name != "reg_token"}
    np.testing.assert_allclose(
        logits(model, {**params, "blocks": blocks}),
        logits(without, {**rest, "blocks": blocks}),
        rtol=0,
        atol=1e-6,
    )


@pytest.mark.parametrize("registers", [0, 2])
def test_the_mean_patch_is_normalised_after_the_mean(registers):
    model, params = vit(mean_pool=True, registers=registers)
    assert "norm" not in params
    _, inside = forward_intermediates(model, {"params": params}, IMAGES)
    tokens = np.float64(inside["blocks"]["features"][-1])
    assert tokens.shape == (3, 1 + registers + PATCHES, 12)
    mean = tokens[:, 1 + registers :].mean(axis=1)
    centred = mean - mean.mean(axis=-1, keepdims=True)
    normal = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6)
    scale, bias = (np.float64(params["fc_norm"][name])[None] for name in ("scale", "bias"))
    features = normal * scale + bias
    np.testing.assert_allclose(inside["features"], features, rtol=0, atol=1e-5)
    head = features @ np.float64(params["head"]["kernel"]) + np.float64(params["head"]["bias"])
    np.testing.assert_allclose(logits(model, params), head, rtol=0, atol=1e-5)


def test_a_gated_mlp_is_silu_of_one_half_times_the_other():
    model, params = vit(swiglu=True)
    first = jax.tree.map(lambda leaf: leaf[0], params["blocks"]["mlp"])
    mlp = jax.tree.map(np.float64, first)
    assert mlp["fc1"]["kernel"].shape == (12, 48)
    assert mlp["fc2"]["kernel"].shape == (24, 12)
    x = np.random.default_rng(0).standard_normal((2, 7, 12))
    both = x @ mlp["fc1"]["kernel"] + mlp["fc1"]["bias"]
    gate, value = both[..., :24], both[..., 24:]
    expected = gate / (1 + np.exp(-gate)) * value @ mlp["fc2"]["kernel"] + mlp["fc2"]["bias"]
    found = Mlp(48, activation=model.activation).apply({"params": first}, jnp.float32(x))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_names_of_timm_and_back_stacked_or_not(options):
    model, params = vit(**options)
    weights = to_timm({"params": params})
    single = model.clone(stacked=False)
    np.testing.assert_allclose(
        single.apply(from_timm(weights, single), IMAGES), logits(model, params), rtol=0, atol=1e-5
    )
    assert ("reg_token" in weights) == bool(model.registers)
    assert ("fc_norm.weight" in weights) == model.mean_pool


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"registers": -1}, "registers -1 must be 0 or more"),
        ({"registers": 2, "class_token": "mean"}, "registers 2 goes with class_token 'input', not 'mean'"),
        ({"class_position": False, "class_token": 1}, "class_position False goes with class_token 'input'"),
        ({"mean_pool": True, "distilled": True}, "mean_pool True leaves the two tokens"),
    ],
)  # fmt: skip
def test_options_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        create_model("vit_tiny", image_size=32, **options)
    with pytest.raises(UserError, match="cait_xxs24 has no attribute 'registers'"):
        create_model("cait_xxs24", registers=2)


def test_named_relatives_differ_where_their_papers_say():
    dinov2 = create_model("vit_small_patch14_dinov2.lvd142m")
    assert (dinov2.patch_size, dinov2.image_size, dinov2.num_classes) == (14, (518, 518), 0)
    assert (dinov2.residual, dinov2.layer_scale_init) == ("layerscale", 1e-5)
    assert dinov2.class_position
    registers = create_model("vit_small_patch14_reg4_dinov2.lvd142m")
    assert (registers.registers, registers.class_position) == (4, False)
    giant = create_model("vit_giant_patch14_dinov2.lvd142m")
    assert giant.swiglu
    assert int(giant.mlp_ratio * giant.width) == 2 * 4096
    deit3 = create_model("deit3_large_patch16_384")
    assert (deit3.residual, deit3.class_position, deit3.image_size) == (
        "layerscale",
        False,
        (384, 384),
    )
    mae = create_model("vit_base_patch16_224.mae", num_classes=10, mean_pool=True)
    assert (mae.num_classes, mae.mean_pool, mae.residual) == (10, True, "plain")
