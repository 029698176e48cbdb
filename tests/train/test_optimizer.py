"""Schedule, decay mask and chain of the paper's recipe."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import create_model
from cait_jax.models.stacking import unstack_blocks
from cait_jax.train.optimizer import decay_mask, learning_rate_schedule, make_optimizer


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
