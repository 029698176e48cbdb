"""Each choice of the paper's studies has the property that defines it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from trees import random_params

from cait_jax import UserError, create_model, forward_intermediates
from cait_jax.models.cait import CaiT
from cait_jax.models.vit import VisionTransformer

SIZE = {"image_size": 8, "patch_size": 2, "width": 32, "num_heads": 2, "depth": 2}
NO_SCALE = {"plain", "t_fixup"}


def small(**overrides):
    """16 patches, 2 heads, 2 blocks, 3 classes, one channel."""
    attributes = {**SIZE, "num_classes": 3, "precision": "highest", **overrides}
    return create_model("cait_nano4_patch4_8", **attributes)


def images(batch=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, 8, 8, 1))


def started(model, seed=0):
    """Variables as the model's own initialisation gives them."""
    return model.init(jax.random.key(seed), images())


def names(tree):
    return {jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in
            jax.tree_util.tree_leaves_with_path(tree)}  # fmt: skip


def same(a, b, atol=2e-6):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


# Residual branches


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scheme", ["plain", slow("rezero"), slow("fixup"), slow("t_fixup")])
def test_norms_can_be_left_out(scheme, norm):
    params = started(small(residual=scheme, block_norm=norm))["params"]
    assert {"blocks/norm1/scale", "blocks_token_only_0/norm2/bias"} <= names(params) or not norm
    assert norm == any("norm1" in name for name in names(params))
    assert "norm/scale" in names(params)
    assert scheme in NO_SCALE or "blocks/branch_scale_1/alpha" in names(params)


@pytest.mark.parametrize("scheme", ["scalar", "layerscale"])
def test_norms_stay_where_they_belong_to_the_scheme(scheme):
    with pytest.raises(UserError, match=f"residual '{scheme}' keeps its norms: only plain, rezero"):
        small(residual=scheme, block_norm=False)


def test_plain_is_layerscale_with_every_gamma_one():
    scaled = random_params(small())
    ones = jax.tree_util.tree_map_with_path(
        lambda path, leaf: jnp.ones_like(leaf) if path[-1].key == "gamma" else leaf, scaled
    )
    plain = {
        name: {k: v for k, v in sub.items() if not k.startswith("layer_scale")}
        if name.startswith("blocks") else sub
        for name, sub in ones.items()
    }  # fmt: skip
    same(
        small(residual="plain").apply({"params": plain}, images()),
        small().apply({"params": ones}, images()),
    )


def test_scalar_is_layerscale_with_one_number_a_branch():
    model = small(residual="scalar", layer_scale_init=0.25)
    params = started(model)["params"]
    assert float(params["blocks"]["branch_scale_1"]["alpha"][1]) == 0.25
    params = random_params(model)

    def spread(block):
        scales = {
            f"layer_scale_{i}": {
                "gamma": jnp.broadcast_to(
                    jnp.asarray(block[f"branch_scale_{i}"]["alpha"])[..., None],
                    (*block[f"branch_scale_{i}"]["alpha"].shape, 32),
                )
            }
            for i in (1, 2)
        }
        return {k: v for k, v in block.items() if not k.startswith("branch")} | scales

    wide = {n: spread(sub) if n.startswith("blocks") else sub for n, sub in params.items()}
    same(model.apply({"params": params}, images()), small().apply({"params": wide}, images()))


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scheme", ["rezero", "skipinit", "fixup"])
def test_rezero_and_fixup_start_as_the_identity(scheme, norm):
    model = small(residual=scheme, block_norm=norm)
    variables = started(model)
    logits, inside = forward_intermediates(model, variables, images())
    features = inside["blocks"]["features"]
    np.testing.assert_array_equal(features[0], features[1])
    cls = jnp.broadcast_to(variables["params"]["cls_token"], (2, 1, 32))
    np.testing.assert_array_equal(inside["blocks_token_only"]["features"][1], cls)
    alphas = variables["params"]["blocks"]["branch_scale_2"]["alpha"]
    assert alphas.shape == (2,)
    assert alphas.tolist() == ([1.0, 1.0] if scheme == "fixup" else [0.0, 0.0])
    if scheme == "fixup":
        np.testing.assert_array_equal(logits, jnp.zeros_like(logits))


def test_skipinit_is_another_name_of_rezero():
    rezero, skipinit = small(residual="rezero"), small(residual="skipinit")
    params = random_params(rezero)
    assert names(params) == names(random_params(skipinit))
    np.testing.assert_array_equal(
        rezero.apply({"params": params}, images()), skipinit.apply({"params": params}, images())
    )


def test_rezero_learns_from_the_first_step():
    """The branch is closed, and the gradient of its scalar is not."""
    model = small(residual="rezero", class_token="mean")
    params = started(model)["params"]
    grads = jax.grad(lambda p: model.apply({"params": p}, images())[:, 0].sum())(params)
    assert np.abs(grads["blocks"]["branch_scale_1"]["alpha"]).min() > 0
    assert np.abs(grads["blocks"]["mlp"]["fc1"]["kernel"]).max() == 0


def wide_start(scheme):
    """Start values of matrices large enough to measure their spread: N = 4 + 2 blocks."""
    model = small(residual=scheme, width=96, depth=4)
    return started(model)["params"]["blocks"]


def test_fixup_scales_he_by_the_number_of_branches():
    blocks = wide_start("fixup")
    std = np.sqrt(2 / 96) * (2 * 6) ** -0.5
    assert np.std(blocks["attn"]["qkv"]["kernel"]) == pytest.approx(std, rel=0.02)
    assert np.std(blocks["mlp"]["fc1"]["kernel"]) == pytest.approx(std, rel=0.02)
    for last in (blocks["attn"]["proj"], blocks["mlp"]["fc2"]):
        assert not np.any(last["kernel"])


def test_fixup_has_a_scalar_bias_before_every_linear_layer_of_a_branch():
    model = small(residual="fixup", depth=1)
    params = random_params(model)
    attn, mlp = params["blocks"]["attn"], params["blocks"]["mlp"]
    assert attn["before_qkv"]["bias"].shape == attn["before_proj"]["bias"].shape == (1,)
    # A scalar before a linear layer is the column sums of its matrix in the bias after it.
    moved = jax.tree.map(lambda leaf: leaf, params)
    for part, layer in ((attn, "proj"), (mlp, "fc2"), (attn, "qkv"), (mlp, "fc1")):
        name = "attn" if part is attn else "mlp"
        shift = part[f"before_{layer}"]["bias"][:, None] * part[layer]["kernel"].sum(axis=1)
        moved["blocks"][name][layer]["bias"] = part[layer]["bias"] + shift
        moved["blocks"][name][f"before_{layer}"]["bias"] = jnp.zeros((1,))
    x = images()
    before = model.apply({"params": params}, x)
    same(before, model.apply({"params": moved}, x), atol=1e-5 * float(jnp.abs(before).max()))


@pytest.mark.parametrize("remat", ["none", "elementwise", "block"])
@pytest.mark.parametrize("stacked", [True, False])
def test_fixups_biases_are_in_branches_and_nowhere_else(stacked, remat):
    params = started(small(residual="fixup", depth=1, stacked=stacked, remat=remat))["params"]
    mlp = {"mlp/before_fc1/bias", "mlp/before_fc2/bias"}
    patches = {"attn/before_qkv/bias", "attn/before_proj/bias"} | mlp
    token = {f"attn/before_{layer}/bias" for layer in ("q", "k", "v", "proj")} | mlp
    first = "blocks" if stacked else "blocks_0"
    blocks = {first: patches, "blocks_token_only_0": token, "blocks_token_only_1": token}
    assert {name for name in names(params) if "before" in name} == {
        f"{block}/{bias}" for block, biases in blocks.items() for bias in biases
    }


def test_t_fixup_scales_glorot_where_its_rule_says():
    blocks = wide_start("t_fixup")
    factor = 0.67 * 6**-0.25
    q, k, v = np.split(np.asarray(blocks["attn"]["qkv"]["kernel"]), 3, axis=-1)
    square, mlp = np.sqrt(6 / (96 + 96)), np.sqrt(6 / (96 + 384))
    for matrix, bound in (
        (q, square),
        (k, square),
        (v, factor * square),
        (blocks["attn"]["proj"]["kernel"], factor * square),
        (blocks["mlp"]["fc1"]["kernel"], factor * mlp),
        (blocks["mlp"]["fc2"]["kernel"], factor * mlp),
    ):
        largest = np.abs(matrix).max()
        assert 0.99 * bound < largest <= bound * (1 + 1e-6)
        assert np.std(matrix) == pytest.approx(bound / np.sqrt(3), rel=0.02)
    assert not np.array_equal(q, k)


# Talking heads


def test_heads_that_do_not_talk_are_heads_mixed_by_the_identity():
    talking, silent = small(), small(talking_heads=False)
    params = random_params(talking)
    attn = params["blocks"]["attn"]
    for mixing in ("proj_l", "proj_w"):
        attn[mixing] = {"kernel": jnp.stack([jnp.eye(2)] * 2), "bias": jnp.zeros((2, 2))}
    mixed = talking.apply({"params": params}, images())
    params["blocks"]["attn"] = {k: v for k, v in attn.items() if not k.startswith("proj_")}
    logits, inside = forward_intermediates(silent, {"params": params}, images())
    same(logits, mixed, atol=1e-5 * float(jnp.abs(mixed).max()))
    assert set(inside["blocks"]) == {"features", "logits", "softmax"}


# The class token


def test_input_token_has_a_position_of_its_own_and_attends_from_the_start():
    model = small(class_token="input")
    params = random_params(model)
    assert params["pos_embed"].shape == (1, 17, 32)
    assert model.class_depth == 0
    moved = params | {"cls_token": params["cls_token"][..., ::-1]}
    _, before = forward_intermediates(model, {"params": params}, images())
    _, after = forward_intermediates(model, {"params": moved}, images())
    assert before["blocks"]["softmax"].shape == (2, 2, 2, 17, 17)
    patches = [inside["blocks"]["features"][0][:, 1:] for inside in (before, after)]
    assert np.abs(patches[0] - patches[1]).max() > 1e-3


def test_a_token_inserted_at_block_k_is_unknown_before_it():
    model = small(class_token=2, depth=4)
    params = random_params(model)
    assert params["pos_embed"].shape == (1, 16, 32)
    assert not model.stacked
    assert small(class_token="2", depth=4) == model  # as a command line gives it
    moved = params | {"cls_token": params["cls_token"][..., ::-1]}
    _, before = forward_intermediates(model, {"params": params}, images())
    _, after = forward_intermediates(model, {"params": moved}, images())
    tokens = [block["features"].shape[1] for block in before["blocks"]]
    assert tokens == [16, 16, 17, 17]
    for i, (a, b) in enumerate(zip(before["blocks"], after["blocks"], strict=True)):
        assert np.array_equal(a["features"], b["features"]) == (i < 2)


def test_a_token_inserted_at_block_0_is_an_input_token_without_position():
    inserted = small(class_token=0)
    params = random_params(inserted)
    as_input = params | {
        "pos_embed": jnp.concatenate([jnp.zeros((1, 1, 32)), params["pos_embed"]], axis=1)
    }
    same(
        inserted.apply({"params": params}, images()),
        small(class_token="input", stacked=False).apply({"params": as_input}, images()),
    )


def test_mean_pooling_has_no_token_and_forgets_the_order_of_patches():
    model = small(class_token="mean")
    params = random_params(model)
    assert "cls_token" not in params
    params["pos_embed"] = jnp.zeros_like(params["pos_embed"])
    x = images()
    patches = x.reshape(2, 4, 2, 4, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 16, 2, 2, 1)
    shuffled = patches[:, jax.random.permutation(jax.random.key(3), 16)]
    shuffled = shuffled.reshape(2, 4, 4, 2, 2, 1).transpose(0, 1, 3, 2, 4, 5).reshape(2, 8, 8, 1)
    logits = model.apply({"params": params}, x)
    scale = float(jnp.abs(logits).max())
    same(logits, model.apply({"params": params}, shuffled), atol=1e-5 * scale)
    assert np.abs(logits[0] - logits[1]).max() > 1e-3 * scale


@pytest.mark.parametrize("class_depth", [1, 3])
def test_any_number_of_class_attention_blocks(class_depth):
    model = small(class_depth=class_depth)
    params = random_params(model)
    found = {name for name in params if name.startswith("blocks_token_only")}
    assert found == {f"blocks_token_only_{i}" for i in range(class_depth)}
    _, inside = forward_intermediates(model, {"params": params}, images())
    assert inside["blocks_token_only"]["softmax"].shape == (class_depth, 2, 2, 1, 17)


def test_class_attention_with_another_mlp_and_without():
    narrow, none = small(class_mlp_ratio=1.5), small(class_mlp_ratio=0.0)
    assert random_params(narrow)["blocks_token_only_1"]["mlp"]["fc1"]["kernel"].shape == (32, 48)
    assert random_params(narrow)["blocks"]["mlp"]["fc1"]["kernel"].shape == (2, 32, 128)
    params = random_params(none)
    assert set(params["blocks_token_only_0"]) == {"attn", "norm1", "layer_scale_1"}
    # Without an MLP a block adds its attention and nothing else.
    _, inside = forward_intermediates(none, {"params": params}, images())
    closed = jax.tree.map(lambda leaf: leaf, params)
    closed["blocks_token_only_1"]["layer_scale_1"]["gamma"] = jnp.zeros(32)
    _, after = forward_intermediates(none, {"params": closed}, images())
    token = after["blocks_token_only"]["features"]
    np.testing.assert_array_equal(token[1], token[0])
    assert np.abs(inside["blocks_token_only"]["features"][1] - token[1]).max() > 1e-3


# Both shapes of network


def test_vit_with_the_papers_choices_is_cait():
    attributes = {**SIZE, "image_size": (8, 8), "in_channels": 1, "num_classes": 3}
    cait = CaiT(**attributes, layer_scale_init=0.1)
    vit = VisionTransformer(
        **attributes, layer_scale_init=0.1, residual="layerscale", talking_heads=True,
        class_token="class_attention",
    )  # fmt: skip
    params = random_params(cait)
    assert names(params) == names(random_params(vit))
    np.testing.assert_array_equal(
        cait.apply({"params": params}, images()), vit.apply({"params": params}, images())
    )


@pytest.mark.slow
def test_stochastic_depth_grows_from_nothing_to_its_rate():
    """Branches that each add a constant count themselves; block 0 always adds, block 2 half the time."""
    batch = 2000
    model = small(
        width=4, num_heads=1, depth=3, image_size=2, num_classes=0, layer_scale_init=1.0,
        drop_path_rate=0.5, drop_path_growth="linear",
    )  # fmt: skip
    params = jax.tree.map(jnp.zeros_like, random_params(model))
    params["blocks"]["layer_scale_1"]["gamma"] += 1.0
    params["blocks"]["attn"]["proj"]["bias"] += jnp.array([1.0, 10.0, 100.0])[:, None]
    _, state = model.apply(
        {"params": params}, jnp.zeros((batch, 2, 2, 1)), train=True,
        rngs={"drop_path": jax.random.key(0)}, mutable=["intermediates"],
    )  # fmt: skip
    features = np.asarray(state["intermediates"]["blocks"]["features"])[:, :, 0, 0]
    added = np.diff(features, axis=0, prepend=0.0)
    for block, (rate, amount) in enumerate([(0.0, 1.0), (0.25, 10.0), (0.5, 100.0)]):
        kept = added[block] != 0
        np.testing.assert_allclose(added[block][kept], amount / (1 - rate), rtol=1e-4)
        assert 1 - kept.mean() == pytest.approx(rate, abs=0.04)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"residual": "zero"}, "residual 'zero' must be one of layerscale, scalar, plain"),
        ({"class_token": "cls"}, "class_token 'cls' must be one of class_attention, input, mean"),
        ({"class_token": 2}, "number of the block before which it joins the patches, 0 to 1"),
        ({"class_token": True}, "class_token True must be one of"),
        ({"class_token": "mean", "class_depth": 2}, "class_depth 2 .* not 'mean': leave them out"),
        ({"class_depth": 0}, "class_depth 0 must be at least 1 with class_token 'class_attention'"),
        ({"distilled": True}, "distilled goes with class_token 'input', not 'class_attention'"),
        ({"drop_path_growth": "cubic"}, "drop_path_growth 'cubic' must be one of constant, linear"),
    ],
)
def test_options_that_do_not_fit_get_one_sentence(options, sentence):
    with pytest.raises(UserError, match=sentence):
        small(**options)
