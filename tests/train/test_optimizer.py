"""Schedule, decay mask and chain of the paper's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from trees import random_params

from cait_jax import UserError, create_model
from cait_jax.models.stacking import stack_blocks, unstack_blocks
from cait_jax.train.optimizer import (
    OPTIMIZERS,
    decay_mask,
    learning_rate_schedule,
    make_optimizer,
)


def test_schedule_warms_up_linearly_and_ends_at_the_final_rate():
    schedule = learning_rate_schedule(
        peak=1e-3, total_steps=400, warmup_steps=100, warmup_from=1e-6, final=1e-5
    )
    rates = np.array([schedule(step) for step in range(401)])
    assert rates[0] == pytest.approx(1e-6, rel=1e-5)
    assert rates[50] == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-5)
    assert rates[100] == pytest.approx(1e-3, rel=1e-5)
    assert rates[250] == pytest.approx((1e-5 + 1e-3) / 2, rel=1e-4)
    assert rates[400] == pytest.approx(1e-5, rel=1e-4)
    assert rates.argmax() == 100


def test_a_run_shorter_than_its_warm_up_ends_inside_it():
    schedule = learning_rate_schedule(peak=1e-3, total_steps=5, warmup_steps=100, warmup_from=0.0)
    np.testing.assert_allclose([schedule(s) for s in range(5)], np.arange(5) * 1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def params():
    model = create_model("cait_nano4_patch4_8", depth=2, num_classes=10)
    return random_params(model)


@pytest.mark.parametrize("form", [dict, unstack_blocks])
def test_decay_skips_tokens_positions_biases_norms_and_gammas(params, form):
    spared, decayed = set(), set()
    for path, decays in jax.tree_util.tree_leaves_with_path(decay_mask(form(params))):
        name = path[-1].key if len(path) == 1 else f"{path[-2].key}.{path[-1].key}"
        (decayed if decays else spared).add(name)
    assert decayed == {
        f"{layer}.kernel"
        for layer in ("proj", "qkv", "proj_l", "proj_w", "q", "k", "v", "fc1", "fc2", "head")
    }
    assert {"cls_token", "pos_embed", "norm1.scale", "norm2.bias", "norm.scale"} <= spared
    assert {"layer_scale_1.gamma", "layer_scale_2.gamma", "proj_l.bias", "head.bias"} <= spared


def test_the_step_is_adamws_by_hand(params):
    """Two steps against the formula, in float64, on parameters of every kind."""
    params = {name: params[name] for name in ("cls_token", "head", "norm", "patch_embed")}
    optimizer = make_optimizer(lambda step: 1e-2 * (step + 1), weight_decay=0.1)
    state = optimizer.init(params)
    gradient = jax.tree.map(lambda leaf: jnp.cos(leaf) * 0.1, params)
    current = params
    for _ in range(2):
        updates, state = optimizer.update(gradient, state, current)
        current = jax.tree.map(jnp.add, current, updates)
    for (path, found), start, g, decays in zip(
        jax.tree_util.tree_leaves_with_path(current),
        jax.tree.leaves(params),
        jax.tree.leaves(gradient),
        jax.tree.leaves(decay_mask(params)),
        strict=True,
    ):
        p, g = np.float64(start), np.float64(g)
        for lr in (1e-2, 2e-2):  # with a constant gradient both unbiased moments are g and g * g
            p = p - lr * (g / (np.abs(g) + 1e-8) + 0.1 * decays * p)
        np.testing.assert_allclose(found, p, rtol=0, atol=2e-6, err_msg=str(path))


def test_clipping_bounds_the_gradients_norm():
    optimizer = make_optimizer(lambda _: 1.0, clip_norm=1.0, weight_decay=0.0, eps=1.0)
    params = {"kernel": jnp.zeros(4)}
    large, _ = optimizer.update({"kernel": jnp.full(4, 100.0)}, optimizer.init(params), params)
    unit, _ = optimizer.update({"kernel": jnp.full(4, 0.5)}, optimizer.init(params), params)
    np.testing.assert_allclose(large["kernel"], unit["kernel"], rtol=1e-6)


def trained(optimizer, params, steps=3):
    """Some steps down a gradient that depends on the parameters."""

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda leaf: jnp.cos(3 * leaf), params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    return params


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_stacked_and_single_blocks_take_the_same_steps(params, name):
    optimizer = make_optimizer(lambda _: 1e-2, name=name, clip_norm=1.0)
    found = trained(optimizer, params)
    single = stack_blocks(trained(optimizer, unstack_blocks(params)))
    assert jax.tree.structure(found) == jax.tree.structure(single)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        other = single
        for key in path:
            other = other[key.key]
        np.testing.assert_allclose(leaf, other, rtol=0, atol=2e-6, err_msg=str(path))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_kernels_decay(name):
    params = {"layer": {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}}
    optimizer = make_optimizer(lambda _: 1e-2, name=name, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.all(updates["layer"]["kernel"] < 0)
    np.testing.assert_array_equal(updates["layer"]["bias"], np.zeros(2))


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_by_hand(nesterov):
    p, momentum = np.array([1.0, -2.0]), 0.0
    found = {"kernel": jnp.asarray(p)}
    optimizer = make_optimizer(lambda _: 0.1, name="sgd", nesterov=nesterov, weight_decay=0.2)
    state = optimizer.init(found)
    for gradient in ([0.5, 1.0], [-1.0, 0.25]):
        updates, state = optimizer.update({"kernel": jnp.asarray(gradient)}, state, found)
        found = optax.apply_updates(found, updates)
        decayed = np.array(gradient) + 0.2 * p
        momentum = decayed + 0.9 * momentum
        p = p - 0.1 * (decayed + 0.9 * momentum if nesterov else momentum)
    np.testing.assert_allclose(found["kernel"], p, rtol=1e-6)


def test_lamb_moves_by_the_norm_of_what_it_moves():
    params = {
        "blocks": {"kernel": jnp.array([[3.0, 4.0], [0.6, 0.8]])},
        "head": jnp.array([6.0, 8.0]),
    }
    gradient = jax.tree.map(jnp.sign, params)
    optimizer = make_optimizer(lambda _: 0.1, name="lamb", weight_decay=0.0)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    norms = np.linalg.norm(updates["blocks"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, [0.5, 0.1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updates["head"]), 1.0, rtol=1e-5)


def test_lion_by_hand():
    params = {"kernel": jnp.array([1.0, -2.0])}
    optimizer = make_optimizer(lambda _: 0.1, name="lion", b1=0.9, b2=0.5, weight_decay=0.2)
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.array([1.0, 1.0])}, state, params)
    # The moment is 0.5: with 0.1 of the new gradient, 0.45 + 0.1 g.
    updates, _ = optimizer.update({"kernel": jnp.array([-4.0, -5.0])}, state, params)
    np.testing.assert_allclose(updates["kernel"], [-0.1 * (1 + 0.2), -0.1 * (-1 - 0.4)], rtol=1e-5)


def test_an_unknown_optimizer_is_named_with_those_that_exist():
    with pytest.raises(UserError, match="no optimizer 'adam'; nearest: adamw"):
        make_optimizer(lambda _: 1.0, name="adam")
