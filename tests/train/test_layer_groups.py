"""What each part of a network is, and that what is frozen keeps its bits.

`fixtures/layer_ids.json` holds, by the beginning of a parameter's name in timm 1.0.31, the layer id of
`group_parameters` and the `lr_scale` of `param_groups_layer_decay(layer_decay=0.75)`, for networks of patches
of 4, width 8 and two heads.
"""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow, slow_unless
from trees import random_params, unstack_blocks

from cait_jax import UserError, create_model
from cait_jax.train.layer_groups import (
    block_numbers,
    layer_decay,
    layer_ids,
    scaled_by_group,
    stop_frozen,
    trainable,
)
from cait_jax.train.optimizer import OPTIMIZERS, make_optimizer
from cait_jax.train.step import apply_updates
from cait_jax.weights.timm_names import to_timm

TINY = {"image_size": 8, "patch_size": 4, "width": 8, "num_heads": 2, "num_classes": 3}
FORMS = {"stacked": dict, "single": unstack_blocks}


@pytest.fixture(scope="module")
def params():
    params = random_params(create_model("cait_xxs24", depth=3, **TINY))
    # Zeros with a sign and numbers too small to be normal keep their bits too.
    return jax.tree.map(lambda leaf: leaf.at[..., 0].set(-0.0).at[..., -1].set(1e-42), params)


@pytest.fixture(scope="module")
def deit():
    return random_params(create_model("deit_tiny_distilled", depth=2, **TINY))


def by_name(tree):
    """Leaves by path, those of stacked blocks slice by slice."""
    tree = dict(tree)
    if "blocks" in tree:
        depth = jax.tree.leaves(tree["blocks"])[0].shape[0]
        stacked = tree.pop("blocks")
        tree |= {f"blocks_{i}": jax.tree.map(lambda a, i=i: a[i], stacked) for i in range(depth)}
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}


def values(factors):
    return {name: leaf.item() for name, leaf in by_name(factors).items()}


def moved(before, after):
    before, after = by_name(before), by_name(after)
    return {name for name in before if before[name].tobytes() != after[name].tobytes()}


def trained(optimizer, params, steps=2):
    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda leaf: 1 + jnp.cos(3 * leaf), params)
        updates, state = optimizer.update(gradient, state, params)
        return apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("form", FORMS)
def test_blocks_are_numbered_in_the_order_of_computation(params, form):
    numbers = values(block_numbers(FORMS[form](params)))
    assert numbers["patch_embed/proj/kernel"] == numbers["pos_embed"] == numbers["cls_token"] == 0
    assert [numbers[f"blocks_{i}/attn/qkv/bias"] for i in range(3)] == [1, 2, 3]
    assert [numbers[f"blocks_token_only_{i}/mlp/fc1/kernel"] for i in range(2)] == [4, 5]
    assert numbers["norm/scale"] == 5
    assert numbers["head/kernel"] == 6


TIMM = json.loads((Path(__file__).parents[1] / "fixtures" / "layer_ids.json").read_text())
NETWORKS = {
    "cait": ("cait_xxs24", {"depth": 4}),
    "cait_short": ("cait_xxs24", {"depth": 1}),
    "cait_three": ("cait_xxs24", {"depth": 3, "class_depth": 3}),
    "vit": ("vit_6x256", {"depth": 3}),
    "deit_distilled": ("deit_tiny_distilled", {"depth": 11}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", NETWORKS)
def test_layer_ids_and_factors_are_timms(name, form):
    base, settings = NETWORKS[name]
    params = FORMS[form](random_params(create_model(base, **TINY, **settings)))

    def published(numbers):
        whole = jax.tree.map(lambda n, leaf: np.broadcast_to(n, leaf.shape), numbers, params)
        named = to_timm({"params": whole})
        assert all((array == array.flat[0]).all() for array in named.values())
        return {key: array.flat[0] for key, array in named.items()}

    ids, factors = published(layer_ids(params)), published(layer_decay(params, 0.75))
    met = set()
    for key in ids:
        first, _, rest = key.partition(".")
        prefix = f"{first}.{rest.partition('.')[0]}" if first.startswith("blocks") else first
        met.add(prefix)
        assert (ids[key], factors[key]) == tuple(TIMM[name][prefix]), key
    assert met == set(TIMM[name])


def test_factors_broadcast_without_a_change_of_rank(params):
    for factors in (layer_decay(params, 0.5), trainable(params, 3)):
        for leaf, factor in zip(jax.tree.leaves(params), jax.tree.leaves(factors), strict=True):
            assert factor.ndim in (0, leaf.ndim)
            assert np.broadcast_shapes(factor.shape, leaf.shape) == leaf.shape


@pytest.mark.parametrize(
    ("name", "form"),
    slow_unless(
        lambda name, form: name == "adamw" and form == "stacked",
        [*((name, "stacked") for name in OPTIMIZERS), ("adamw", "single")],
    ),
)
def test_layer_decay_scales_each_layers_step(params, name, form):
    params = FORMS[form](params)
    plain = make_optimizer(lambda _: 1e-2, name=name, weight_decay=0.1)
    scaled = scaled_by_group(plain, functools.partial(layer_decay, rate=0.5))
    gradient = jax.tree.map(jnp.cos, params)
    steps = [
        by_name(optimizer.update(gradient, optimizer.init(params), params)[0])
        for optimizer in (plain, scaled)
    ]
    ids = values(layer_ids(params))
    for leaf, step in steps[1].items():
        # Powers of 2 are exact, one operation at a time: compiled, a product and a sum may become one rounding.
        np.testing.assert_array_equal(step, steps[0][leaf] * 0.5 ** (4 - ids[leaf]))


PARTS = {
    "all": ("",),
    "head": ("head/",),
    "class_attention": ("cls_token", "blocks_token_only_", "norm/", "head/"),
    0: ("head/",),
    1: ("blocks_token_only_1/", "norm/", "head/"),
    4: ("blocks_1/", "blocks_2/", "blocks_token_only_", "norm/", "head/"),
    5: ("blocks_", "norm/", "head/"),
}


@pytest.mark.parametrize(
    ("part", "form"), [*((part, "stacked") for part in PARTS), slow("class_attention", "single")]
)
def test_what_learns_moves_and_what_is_frozen_keeps_its_bits(params, part, form):
    params = FORMS[form](params)
    optimizer = make_optimizer(lambda _: 1e-2, weight_decay=0.5, clip_norm=1.0)
    optimizer = scaled_by_group(optimizer, functools.partial(trainable, part=part))
    expected = {name for name in by_name(params) if name.startswith(PARTS[part])}
    assert moved(params, trained(optimizer, params)) == expected


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "adamw", OPTIMIZERS))
def test_every_optimizer_leaves_alone_what_is_frozen(params, name):
    optimizer = make_optimizer(lambda _: 1e-2, name=name, weight_decay=0.5, clip_norm=1.0)
    optimizer = scaled_by_group(optimizer, functools.partial(trainable, part=3))
    single = trained(optimizer, unstack_blocks(params))
    stacked = trained(optimizer, params)
    expected = {name for name in by_name(params) if name.startswith((*PARTS[4][1:],))}
    assert moved(params, stacked) == expected
    assert moved(unstack_blocks(params), single) == expected
    other = by_name(single)
    for leaf, found in by_name(stacked).items():
        np.testing.assert_allclose(found, other[leaf], rtol=0, atol=2e-6, err_msg=leaf)


def test_frozen_gradients_neither_clip_nor_spoil_those_of_the_rest(params):
    optimizer = make_optimizer(
        lambda _: 1.0, name="sgd", momentum=0.0, clip_norm=1.0, weight_decay=0.0
    )
    optimizer = scaled_by_group(optimizer, functools.partial(trainable, part="head"))
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, jnp.nan), params)
    gradient["head"] = jax.tree.map(lambda leaf: jnp.full_like(leaf, 0.1), params["head"])
    updates, _ = jax.jit(optimizer.update)(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["head"]["bias"], np.full(3, -0.1), rtol=1e-6)
    after = jax.jit(apply_updates)(params, updates)
    assert moved(params, after) == {"head/kernel", "head/bias"}


def test_no_gradient_is_computed_for_what_is_frozen():
    model = create_model("cait_xxs24", depth=3, **TINY)
    params = random_params(model)
    images = jnp.ones((1, 8, 8, 3))

    def backward(part):
        mask = trainable(params, part)

        def loss(params):
            return (model.apply({"params": stop_frozen(params, mask)}, images) ** 2).sum()

        return jax.grad(loss)

    scans = {
        part: str(jax.make_jaxpr(backward(part))(params)).count("scan[")
        for part in ("all", "head", "class_attention")
    }
    assert scans == {"all": 2, "head": 1, "class_attention": 1}

    gradient = by_name(jax.jit(backward(4))(params))
    zero = {name for name, leaf in gradient.items() if not leaf.any()}
    frozen = {name for name in gradient if not name.startswith(PARTS[4])}
    assert frozen <= zero
    assert "blocks_1/mlp/fc1/kernel" not in zero


def test_what_does_not_exist(params, deit):
    for part in ("heads", 6, -1):
        with pytest.raises(UserError, match="from 0 to 5"):
            trainable(params, part)
    with pytest.raises(UserError, match="no class-attention blocks"):
        trainable(deit, "class_attention")
    headless = {name: value for name, value in params.items() if name != "head"}
    with pytest.raises(UserError, match="num_classes above 0"):
        trainable(headless, "head")
    with pytest.raises(UserError, match="'stem' belong to no layer"):
        layer_ids({"stem": {"kernel": jnp.zeros(2)}})
    for rate in (0.0, 1.1):
        with pytest.raises(UserError, match=r"in \(0, 1\]"):
            layer_decay(params, rate)
