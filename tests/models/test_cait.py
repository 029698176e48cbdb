"""Properties of the network: sizes, dtypes, initialisation, invariances, what is recorded."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow
from trees import random_params, stack_blocks, unstack_blocks

import cait_jax
from cait_jax import create_model, forward_intermediates
from cait_jax.models.cait import CaiT, Mlp, SelfAttention
from cait_jax.models.inspect import macs_of
from cait_jax.models.layers import keep_mask

NAME = "cait_nano4_patch4_8"


def small(**overrides):
    """16 patches, 2 heads of 48 channels, 6 blocks."""
    return create_model(
        NAME, **{"patch_size": 2, "width": 96, "num_heads": 2, "depth": 6, **overrides}
    )


def images(model, batch=2, seed=1):
    return jax.random.normal(jax.random.key(seed), (batch, *model.image_size, model.in_channels))


def init(model, seed=0):
    return jax.jit(model.init)(jax.random.key(seed), images(model))


@pytest.fixture(scope="module")
def model():
    return small(num_classes=10, depth=2, precision="highest")


@pytest.fixture(scope="module")
def params(model):
    return random_params(model)


# The face


def test_any_multiple_of_the_patch_and_any_channels():
    model = small(image_size=(4, 10), in_channels=5, num_classes=3, depth=1)
    params = random_params(model)
    assert model.apply({"params": params}, images(model)).shape == (2, 3)
    assert params["pos_embed"].shape == (1, 2 * 5, 96)


def test_no_classes_gives_the_features_the_head_reads():
    model = small(num_classes=0, depth=1)
    variables = {"params": random_params(model)}
    features = model.apply(variables, images(model))
    assert features.shape == (2, 96)
    assert "head" not in variables["params"]
    headed = small(num_classes=10, depth=1)
    head = {"kernel": jnp.ones((96, 10)), "bias": jnp.arange(10.0)}
    logits = headed.apply({"params": variables["params"] | {"head": head}}, images(model))
    np.testing.assert_allclose(
        logits, features @ head["kernel"] + head["bias"][None], atol=1e-4, rtol=0
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: create_model("cait_xs42"), "there is no model 'cait_xs42'; nearest: cait_xs24"),
        (lambda: small(image_size=9), "9x9 cannot be cut in patches of 2x2"),
        (lambda: small(num_heads=5), "num_heads 5 does not divide width 96"),
        (lambda: small(widht=5), "no attribute 'widht'; nearest: width"),
        (lambda: small(drop_path_rate=1.0), r"drop_path_rate 1.0 must lie in \[0, 1\)"),
        (lambda: small(projection_dropout=-0.1), r"projection_dropout -0.1 must lie in \[0, 1\)"),
        (
            lambda: small(remat="all"),
            "remat 'all' must be one of none, elementwise, attention, block",
        ),
        (lambda: small(depth=0), "depth 0 must be at least 1"),
        (lambda: small(num_classes=-1), "num_classes -1 must be 0 or more"),
        (lambda: small(dtype="flaot32"), "dtype 'flaot32'; nearest: float32"),
        (lambda: small(dtype="int8"), "dtype 'int8'; known: bfloat16, float32, float64"),
    ],
)
def test_wrong_arguments_get_one_sentence(call, message):
    with pytest.raises(cait_jax.UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_images_of_another_size_are_refused(model, params):
    with pytest.raises(ValueError, match="do not fit a model for"):
        model.apply({"params": params}, jnp.zeros((1, 10, 8, 1)))


def test_list_models_matches_a_pattern():
    assert cait_jax.list_models("cait_xxs*_224") == ["cait_xxs24_224", "cait_xxs36_224"]
    assert NAME in cait_jax.list_models()


# Number formats


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", slow("float64")])
def test_dtype_of_computation_and_of_parameters_are_apart(dtype):
    with jax.enable_x64(dtype == "float64"):
        model = small(num_classes=10, depth=2, dtype=dtype)
        variables = {"params": random_params(model)}
        wide = jnp.promote_types(dtype, jnp.float32)
        logits, inside = forward_intermediates(model, variables, images(model))
        assert logits.dtype == wide
        for maps in ("logits", "mixed_logits", "softmax", "mixed_softmax"):
            assert inside["blocks"][maps].dtype == wide
        assert inside["blocks"]["features"].dtype == dtype
        assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype("float32")}


@pytest.mark.slow
def test_float64_computes_in_float64_throughout():
    with jax.enable_x64(True):
        wide = small(num_classes=10, depth=2, dtype="float64", param_dtype="float64")
        params = random_params(wide)
        x = images(wide).astype(jnp.float64)
        jaxpr = str(jax.make_jaxpr(lambda p, x: wide.apply({"params": p}, x))(params, x))
        assert "f32" not in jaxpr
        # Moving an input by less than float32 can tell must be seen.
        moved = wide.apply({"params": params}, x + 1e-12)
        assert not np.array_equal(moved, wide.apply({"params": params}, x))


# Initialisation


def test_initialisation_is_the_papers():
    model = create_model("cait_xxs24", image_size=32, depth=3, layer_scale_init=1e-4)
    params = init(model)["params"]
    bound = 768**-0.5
    for leaf in params["patch_embed"]["proj"].values():
        assert float(jnp.abs(leaf).max()) <= bound
    assert float(params["patch_embed"]["proj"]["kernel"].std()) == pytest.approx(
        bound / 3**0.5, rel=0.02
    )
    assert float(jnp.abs(params["patch_embed"]["proj"]["bias"]).max()) > 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        keys = [key.key for key in path]
        if keys[0] == "patch_embed":
            continue
        name = "/".join(keys)
        match keys[-1]:
            case "bias":
                np.testing.assert_array_equal(leaf, 0, err_msg=name)
            case "scale":
                np.testing.assert_array_equal(leaf, 1, err_msg=name)
            case "gamma":
                np.testing.assert_array_equal(leaf, np.float32(1e-4), err_msg=name)
            case _:
                # Six standard errors of a standard deviation.
                assert float(leaf.std()) == pytest.approx(0.02, rel=6 / np.sqrt(2 * leaf.size)), (
                    name
                )
                assert abs(float(leaf.mean())) < 6 * 0.02 / np.sqrt(leaf.size), name
    qkv = params["blocks"]["attn"]["qkv"]["kernel"]
    assert not np.array_equal(qkv[0], qkv[1])


# Invariances


@pytest.mark.slow
def test_a_constant_on_proj_l_or_a_key_bias_changes_nothing(model, params):
    x = images(model)
    logits = model.apply({"params": params}, x)

    def moved(edit):
        changed = jax.tree.map(lambda leaf: leaf, params)
        edit(changed)
        return float(jnp.abs(model.apply({"params": changed}, x) - logits).max())

    def proj_l(p):
        p["blocks"]["attn"]["proj_l"]["bias"] += 3.0

    def key_of_patches(p):
        p["blocks"]["attn"]["qkv"]["bias"] = p["blocks"]["attn"]["qkv"]["bias"].at[:, 96:192].add(3)

    def key_of_class(p):
        p["blocks_token_only_0"]["attn"]["k"]["bias"] += 3.0

    def proj_w(p):
        p["blocks"]["attn"]["proj_w"]["bias"] += 3.0

    def value(p):
        p["blocks_token_only_0"]["attn"]["v"]["bias"] += 3.0

    noise = 5e-5 * float(jnp.abs(logits).max())
    for edit in (proj_l, key_of_patches, key_of_class):
        assert moved(edit) < noise, edit.__name__
    for edit in (proj_w, value):
        assert moved(edit) > 100 * noise, edit.__name__


@pytest.mark.slow
def test_gradients_of_the_invariant_biases_vanish(model, params):
    gradient = jax.grad(lambda p: (model.apply({"params": p}, images(model)) ** 2).mean())(params)
    block = gradient["blocks"]["attn"]
    scale = float(jnp.abs(block["proj_w"]["bias"]).max())
    assert float(jnp.abs(block["proj_l"]["bias"]).max()) < 1e-5 * scale
    of_query, of_key = (jnp.abs(block["qkv"]["bias"][:, i : i + 96]).max() for i in (0, 96))
    assert float(of_key) < 1e-5 * scale
    assert float(of_query) > 100 * float(of_key)


def test_the_class_token_changes_no_patch(model, params):
    other = params | {"cls_token": params["cls_token"][..., ::-1] + 1.0}
    logits, inside = forward_intermediates(model, {"params": params}, images(model))
    other_logits, other_inside = forward_intermediates(model, {"params": other}, images(model))
    for name, value in inside["blocks"].items():
        np.testing.assert_array_equal(value, other_inside["blocks"][name], err_msg=name)
    assert float(jnp.abs(logits - other_logits).max()) > 1e-3


def test_the_patches_enter_and_leave_class_attention_as_the_same_array(model, params):
    seen = []

    def watch(next_method, args, kwargs, context):
        if (
            type(context.module).__name__ == "ClassAttentionBlock"
            and context.method_name == "__call__"
        ):
            seen.append(args[1])
        return next_method(*args, **kwargs)

    from flax import linen as nn

    with nn.intercept_methods(watch):
        model.apply({"params": params}, images(model))
    assert len(seen) == 2
    assert seen[0] is seen[1]


# What is recorded


@pytest.mark.parametrize("stacked", [True, False])
def test_a_block_is_rebuilt_from_the_recorded_maps_and_v(model, params, stacked):
    x = images(model)
    run = model.clone(stacked=stacked)
    logits, inside = forward_intermediates(
        run, {"params": params if stacked else unstack_blocks(params)}, x
    )
    np.testing.assert_array_equal(
        logits, run.apply({"params": params if stacked else unstack_blocks(params)}, x)
    )
    blocks = inside["blocks"]
    assert blocks["mixed_softmax"].shape == (2, 2, 2, 16, 16)
    assert inside["blocks_token_only"]["softmax"].shape == (2, 2, 2, 1, 17)
    np.testing.assert_allclose(blocks["softmax"].sum(-1), 1.0, atol=1e-5)
    np.testing.assert_allclose(inside["blocks_token_only"]["softmax"].sum(-1), 1.0, atol=1e-5)

    p = jax.tree.map(lambda leaf: leaf[1], params["blocks"])

    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / jnp.sqrt(x.var(-1, keepdims=True) + 1e-6)
        return x * p["scale"][None, None] + p["bias"][None, None]

    def linear(x, p):
        return jnp.dot(x, p["kernel"], precision="highest") + p["bias"][None, None]

    def mix(maps, p):
        return (
            jnp.einsum("bhqk,hg->bgqk", maps, p["kernel"], precision="highest")
            + p["bias"][None, :, None, None]
        )

    before = blocks["features"][0]
    np.testing.assert_allclose(
        mix(blocks["logits"][1], p["attn"]["proj_l"]), blocks["mixed_logits"][1], atol=1e-4
    )
    np.testing.assert_allclose(
        jax.nn.softmax(blocks["mixed_logits"][1]), blocks["softmax"][1], atol=1e-6
    )
    np.testing.assert_allclose(
        mix(blocks["softmax"][1], p["attn"]["proj_w"]), blocks["mixed_softmax"][1], atol=1e-5
    )
    v = linear(norm(before, p["norm1"]), p["attn"]["qkv"])[..., 192:].reshape(2, 16, 2, 48)
    out = jnp.einsum("bhqk,bkhc->bqhc", blocks["mixed_softmax"][1], v, precision="highest")
    branch = linear(out.reshape(2, 16, 96), p["attn"]["proj"])
    y = before + p["layer_scale_1"]["gamma"][None, None] * branch
    hidden = jax.nn.gelu(linear(norm(y, p["norm2"]), p["mlp"]["fc1"]), approximate=False)
    y = y + p["layer_scale_2"]["gamma"][None, None] * linear(hidden, p["mlp"]["fc2"])
    scale = float(jnp.abs(y).max())
    np.testing.assert_allclose(y, blocks["features"][1], rtol=0, atol=1e-5 * scale)


def test_nothing_is_recorded_unasked(model, params):
    assert model.apply({"params": params}, images(model)).shape == (2, 10)
    assert set(init(model)) == {"params"}


# Dropout and stochastic depth


def test_training_without_rates_draws_nothing(params):
    model = small(num_classes=10, depth=2, drop_path_rate=0.0, precision="highest")
    x = images(model)
    np.testing.assert_array_equal(
        model.apply({"params": params}, x, train=True), model.apply({"params": params}, x)
    )


@pytest.mark.slow
def test_rates_apply_in_training_only_and_spare_class_attention(params):
    model = small(num_classes=10, depth=2, drop_path_rate=0.5, precision="highest")
    x = images(model)
    plain = model.clone(drop_path_rate=0.0).apply({"params": params}, x)
    np.testing.assert_array_equal(model.apply({"params": params}, x), plain)

    def run(seed, model=model):
        rngs = {name: jax.random.key(seed) for name in ("dropout", "drop_path")}
        return model.apply({"params": params}, x, train=True, rngs=rngs)

    assert not np.array_equal(run(0), plain)
    assert not np.array_equal(run(0), run(1))
    np.testing.assert_array_equal(run(0), run(0))

    touched = set()

    def watch(next_method, args, kwargs, context):
        if type(context.module).__name__ in ("Dropout", "StochasticDepth") and context.module.rate:
            touched.add(context.module.path)
        return next_method(*args, **kwargs)

    from flax import linen as nn

    wet = model.clone(dropout=0.1, attention_dropout=0.1, embedding_dropout=0.1)
    with nn.intercept_methods(watch):
        run(0, wet)
    assert ("pos_drop",) in touched
    assert not any(path[0].startswith("blocks_token_only") for path in touched)
    places = {path[1:] for path in touched if path[0] == "blocks"}
    drops = {("mlp", "drop1"), ("mlp", "drop2"), ("attn", "attn_drop")}
    assert places - {("drop_path_1",), ("drop_path_2",)} == drops | {("attn", "proj_drop")}

    touched.clear()
    with nn.intercept_methods(watch):
        run(0, wet.clone(projection_dropout=0.0, drop_path_rate=0.0))
    assert {path[1:] for path in touched if path[0] == "blocks"} == drops
    touched.clear()
    with nn.intercept_methods(watch):
        run(0, model.clone(projection_dropout=0.2, drop_path_rate=0.0))
    assert touched == {("blocks", "attn", "proj_drop")}


@pytest.mark.slow
def test_drop_path_is_one_rate_a_sample_scaled_and_drawn_twice_a_block():
    """With branches that only add a constant, the output counts the kept branches."""
    batch = 4096
    model = CaiT(
        image_size=(2, 2), width=4, depth=2, num_heads=1, num_classes=0, patch_size=2,
        in_channels=1, drop_path_rate=0.25, layer_scale_init=1.0,
    )  # fmt: skip
    x = jnp.zeros((batch, 2, 2, 1))
    params = jax.tree.map(jnp.zeros_like, model.init(jax.random.key(0), x[:1])["params"])
    params["blocks"]["layer_scale_1"]["gamma"] += 1.0
    params["blocks"]["layer_scale_2"]["gamma"] += 1.0
    # Attention adds 1 in block 0 and 10 in block 1, the MLP 100 and 1000.
    params["blocks"]["attn"]["proj"]["bias"] += jnp.array([1.0, 10.0])[:, None]
    params["blocks"]["mlp"]["fc2"]["bias"] += jnp.array([100.0, 1000.0])[:, None]
    _, state = model.apply(
        {"params": params},
        x,
        train=True,
        rngs={"drop_path": jax.random.key(3)},
        mutable=["intermediates"],
    )
    last = state["intermediates"]["blocks"]["features"][-1][:, 0, 0]
    total = np.asarray(jnp.round(last * 0.75)).astype(int)
    kept = np.stack([(total // 10**i) % 10 for i in range(4)])
    assert set(np.unique(kept)) <= {0, 1}
    np.testing.assert_allclose(kept.mean(axis=1), 0.75, atol=6 * np.sqrt(0.25 * 0.75 / batch))
    correlation = np.corrcoef(kept)
    assert np.abs(correlation - np.eye(4)).max() < 6 / np.sqrt(batch)


@pytest.mark.slow
def test_draws_belong_to_the_examples_position():
    model = small(num_classes=10, depth=2, drop_path_rate=0.3, dropout=0.2)
    params = random_params(model)
    x = images(model, batch=8)
    rngs = {name: jax.random.key(5) for name in ("dropout", "drop_path")}
    whole = model.apply({"params": params}, x, train=True, rngs=rngs)
    rows = jnp.array([6, 1, 3])
    part = model.apply({"params": params}, x[rows], train=True, example_ids=rows, rngs=rngs)
    np.testing.assert_allclose(part, whole[rows], atol=1e-4)


def test_keep_mask_keeps_the_rate_asked_for():
    mask = keep_mask(jax.random.key(0), jnp.arange(64), 0.2, (32, 16))
    assert mask.shape == (64, 32, 16)
    assert abs(float(mask.mean()) - 0.8) < 6 * np.sqrt(0.16 / mask.size)


# Implementations of attention


@pytest.mark.parametrize(("tokens", "loops"), [(16, False), (25, True)])
def test_images_are_looped_over_where_maps_are_large(tokens, loops):
    """Four heads of 16 tokens are 1,024 numbers."""
    side = int(tokens**0.5)
    attn, x = SelfAttention(num_heads=4, implementation="xla_by_image"), jnp.ones((3, side**2, 16))
    variables = attn.init(jax.random.key(0), x)
    text = str(jax.make_jaxpr(attn.apply)(variables, x))
    assert ("scan[" in text) == loops
    assert (f"f32[3,4,{tokens},{tokens}]" in text) == (not loops)


@pytest.mark.parametrize("attention", ["xla", "xla_by_image"])
def test_maps_are_dropped_and_recorded_in_the_plain_way(attention):
    """Other implementations have no maps to drop or to record."""
    model = small(depth=1, patch_size=1, attention=attention, attention_dropout=0.5)
    variables = {"params": random_params(model)}
    x, rngs = images(model), {"dropout": jax.random.key(0)}
    text = str(jax.make_jaxpr(lambda x: model.apply(variables, x, train=True, rngs=rngs))(x))
    assert "f32[2,2,64,64]" in text
    _, inside = forward_intermediates(model, variables, x)
    assert inside["blocks"]["mixed_softmax"].shape == (1, 2, 2, 64, 64)
    text = str(jax.make_jaxpr(lambda x: model.apply(variables, x))(x))
    assert ("f32[2,2,64,64]" in text) == (attention == "xla")


# Forms


@pytest.fixture(scope="module")
def gradients_without_remat():
    """Of the next test, by whether blocks are stacked: computed when one is asked for."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
@pytest.mark.parametrize("remat", ["none", "elementwise", "attention", "block"])
def test_remat_changes_no_gradient_with_dropout_on(params, gradients_without_remat, remat, stacked):
    model = small(
        num_classes=10, depth=2, drop_path_rate=0.3, dropout=0.2, precision="highest",
        remat=remat, stacked=stacked,
    )  # fmt: skip
    given = params if stacked else unstack_blocks(params)
    rngs = {name: jax.random.key(5) for name in ("dropout", "drop_path")}
    x = images(model)

    def loss(p, model):
        return (model.apply({"params": p}, x, train=True, rngs=rngs) ** 2).mean()

    def gradients(model):
        return jax.jit(jax.grad(lambda p: loss(p, model)))(given)

    if stacked not in gradients_without_remat:
        gradients_without_remat[stacked] = gradients(model.clone(remat="none"))
    found = gradients(model)
    for (path, ours), theirs in zip(
        jax.tree_util.tree_leaves_with_path(found),
        jax.tree.leaves(gradients_without_remat[stacked]),
        strict=True,
    ):
        scale = float(jnp.abs(theirs).max())
        np.testing.assert_allclose(
            ours, theirs, rtol=0, atol=1e-5 * scale + 1e-6, err_msg=str(path)
        )

    def products(model):
        return macs_of(jax.make_jaxpr(jax.grad(lambda p: loss(p, model)))(given).jaxpr)

    # Norms and GELU alone are always rematerialised, which costs no matmul.
    assert (products(model) > products(model.clone(remat="none"))) == (remat != "none")


def test_an_mlp_keeps_what_went_in_and_its_wide_product_alone():
    """With JAX's own derivative of GELU it would be five arrays as wide."""
    mlp, x = Mlp(hidden=40), jnp.ones((2, 5, 10))
    variables = mlp.init(jax.random.key(0), x)
    kept = jax.eval_shape(lambda *given: jax.vjp(mlp.apply, *given)[1], variables, x)
    by_token = [leaf.shape for leaf in jax.tree.leaves(kept) if leaf.shape[:2] == (2, 5)]
    assert sorted(by_token) == [(2, 5, 10), (2, 5, 40)]


def test_stacking_is_undone_by_unstacking(params):
    back = stack_blocks(unstack_blocks(params))
    jax.tree.map(np.testing.assert_array_equal, dict(params), back)


def test_unrolled_init_has_the_tree_that_unstacking_gives(model):
    stacked = unstack_blocks(random_params(model))
    unrolled = random_params(model.clone(stacked=False))
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(jnp.shape, dict(unrolled))
