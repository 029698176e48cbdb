"""Decay mask and chain of the paper's recipe, and the other optimisers.

`fixtures/lamb.npz` holds the parameters of `drawn` after 1, 20 and 200 steps of timm 1.0.31's `Lamb(lr=0.01)`
in float64, with a weight decay of 0.05 for kernels and none for the rest.
"""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow_unless
from trees import random_params, stack_blocks, unstack_blocks

from cait_jax import UserError, create_model
from cait_jax.sharding import leaf_paths
from cait_jax.train.config import get_config
from cait_jax.train.muon import labels
from cait_jax.train.optimizer import OPTIMIZERS, decay_mask, from_config, make_optimizer

LAMB = Path(__file__).parents[1] / "fixtures" / "lamb.npz"


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


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "lamb", OPTIMIZERS))
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
def test_weight_decay_follows_a_cosine_over_the_run(name):
    """Without a gradient decay alone moves a kernel, of LAMB times the kernel's norm over that of its decay."""
    config = get_config()
    config.steps, config.optimizer.name, config.optimizer.momentum = 6, name, 0.0
    config.optimizer.weight_decay, config.optimizer.final_weight_decay = 0.04, 0.4
    config.optimizer.schedule, config.optimizer.warmup_epochs = "step", 0.0
    config.optimizer.learning_rate, config.optimizer.reference_batch = 0.5, 0
    optimizer = from_config(config, 1024)
    assert optimizer.total_steps == 6
    params = {"kernel": jnp.full((2, 2), 4.0)}
    state, expected = optimizer.transformation.init(params), 4.0
    for step in range(6):
        decay = 0.4 + (0.04 - 0.4) * (1 + math.cos(math.pi * step / 6)) / 2
        moved = 1.0 / decay if name == "lamb" else 1.0
        expected *= 1 - 0.5 * decay * moved
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = optimizer.transformation.update(zeros, state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_allclose(params["kernel"], expected, rtol=1e-5)


def test_without_a_final_weight_decay_nothing_counts_its_steps():
    config = get_config()
    state = from_config(config, 1024).transformation.init({"kernel": jnp.zeros((2, 2))})
    constant = make_optimizer(lambda _: 0.1).init({"kernel": jnp.zeros((2, 2))})
    assert jax.tree.structure(state) == jax.tree.structure(constant)


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


SHAPES = {
    "pos_embed": (1, 4, 6), "cls_token": (1, 1, 6),
    "patch_embed/proj/kernel": (2, 2, 3, 6), "patch_embed/proj/bias": (6,),
    "blocks_0/attn/qkv/kernel": (6, 18), "blocks_0/attn/qkv/bias": (18,), "blocks_0/attn/proj_l/kernel": (2, 2),
    "blocks_0/layer_scale_1/gamma": (6,), "blocks_0/norm1/scale": (6,),
    "blocks_1/attn/qkv/kernel": (6, 18), "blocks_1/attn/qkv/bias": (18,), "blocks_1/attn/proj_l/kernel": (2, 2),
    "blocks_1/layer_scale_1/gamma": (6,), "blocks_1/norm1/scale": (6,),
    "head/kernel": (6, 3), "head/bias": (3,),
}  # fmt: skip


def nested(flat, dtype):
    tree = {}
    for name, value in flat.items():
        *path, last = name.split("/")
        node = tree
        for key in path:
            node = node.setdefault(key, {})
        node[last] = jnp.asarray(value, dtype)
    return stack_blocks(tree)


def drawn(step):
    """Gradients whose norm is below 1 in a third of the steps; of step -1 the parameters to start from."""
    if step == -1:
        rng = np.random.Generator(np.random.Philox(15))
        start = {"gamma": (1e-5, 0.0), "scale": (1.0, 0.0), "bias": (0.0, 0.0)}
        centres = {name: start.get(name.rpartition("/")[2], (0.0, 0.1)) for name in SHAPES}
    else:
        rng = np.random.Generator(np.random.Philox([15, step + 1]))
        centres = dict.fromkeys(SHAPES, (0.0, 10 ** (3 * rng.random() - 2)))
    return {
        name: centre + width * (2 * rng.random(SHAPES[name]) - 1)
        for name, (centre, width) in centres.items()
    }


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-10), (np.float32, 1e-5)])
def test_lamb_is_timms(dtype, tolerance):
    """Stacked blocks here, single blocks there; tolerances are of each array's norm."""
    with jax.enable_x64(dtype == np.float64):
        optimizer = make_optimizer(lambda _: 0.01, name="lamb", weight_decay=0.05)

        @jax.jit
        def take(params, state, gradient):
            updates, state = optimizer.update(gradient, state, params)
            return optax.apply_updates(params, updates), state

        params = nested(drawn(-1), dtype)
        state = optimizer.init(params)
        recorded = np.load(LAMB)
        for step in range(200):
            params, state = take(params, state, nested(drawn(step), dtype))
            if f"{step + 1}/head/bias" not in recorded:
                continue
            expected = nested({name: recorded[f"{step + 1}/{name}"] for name in SHAPES}, dtype)
            for (path, found), right in zip(
                jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(expected), strict=True
            ):
                assert found.dtype == dtype
                distance = np.linalg.norm(found - right)
                assert distance <= tolerance * np.linalg.norm(right), (step, path)


def test_lamb_scales_what_decays_by_the_norm_of_what_it_moves():
    params = {
        "blocks": {
            "kernel": jnp.array([[3.0, 4.0], [0.6, 0.8]]),
            "gamma": jnp.array([[3.0, 4.0], [0.6, 0.8]]),
        },
        "head": {"kernel": jnp.array([6.0, 8.0]), "bias": jnp.array([6.0, 8.0])},
    }
    gradient = jax.tree.map(jnp.sign, params)
    optimizer = make_optimizer(lambda _: 0.1, name="lamb", weight_decay=1e-9)
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    norms = np.linalg.norm(updates["blocks"]["kernel"], axis=1)
    np.testing.assert_allclose(norms, [0.5, 0.1], rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(updates["head"]["kernel"]), 1.0, rtol=1e-5)
    for adams in (updates["blocks"]["gamma"], updates["head"]["bias"]):
        np.testing.assert_allclose(adams, np.full(adams.shape, -0.1), rtol=1e-4)


def test_lamb_without_decay_is_adam():
    params = {"layer": {"kernel": jnp.array([3.0, 4.0]), "bias": jnp.array([6.0, 8.0])}}
    gradient = jax.tree.map(lambda leaf: 0.01 * leaf, params)
    settings = {"weight_decay": 0.0, "eps": 1e-3}
    lamb, adam = (
        make_optimizer(lambda _: 0.1, name=name, **settings) for name in ("lamb", "adamw")
    )
    for optimizer in (lamb, adam):
        updates, _ = optimizer.update(gradient, optimizer.init(params), params)
        expected = jax.tree.map(lambda g: -0.1 * g / (g + 1e-3), gradient)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), updates, expected)


@pytest.mark.parametrize(
    ("name", "clip_norm", "limit"),
    [
        ("adamw", None, np.inf), ("lion", None, np.inf), ("sgd", None, np.inf), ("lamb", None, 1.0),
        ("lamb", 0.0, np.inf), ("lamb", 2.0, 2.0), ("adamw", 2.0, 2.0),
    ],
)  # fmt: skip
def test_unset_clipping_is_the_optimisers_own(monkeypatch, name, clip_norm, limit):
    """The largest gradient that reaches the optimiser itself."""
    seen = []

    def spy(schedule, *moments, **options):
        del schedule, moments, options

        def update(updates, state, params=None):
            del params
            seen.append(float(optax.tree.norm(updates)))
            return updates, state

        return optax.GradientTransformation(lambda params: optax.EmptyState(), update)

    place = "cait_jax.train.lamb.lamb" if name == "lamb" else f"optax.{name}"
    monkeypatch.setattr(place, spy)
    optimizer = make_optimizer(lambda _: 1.0, name=name, clip_norm=clip_norm)
    params = {"kernel": jnp.zeros(4)}
    optimizer.update({"kernel": jnp.full(4, 50.0)}, optimizer.init(params), params)
    assert seen == [pytest.approx(min(100.0, limit))]


@pytest.mark.parametrize(("name", "eps"), [("adamw", 1e-8), ("lamb", 1e-6)])
def test_unset_eps_is_the_optimisers_own(name, eps):
    params = {"bias": jnp.zeros(1)}
    optimizer = make_optimizer(lambda _: 1.0, name=name)
    gradient = {"bias": jnp.full(1, 1e-7)}
    updates, _ = optimizer.update(gradient, optimizer.init(params), params)
    np.testing.assert_allclose(updates["bias"], [-1e-7 / (1e-7 + eps)], rtol=1e-3)


def test_lion_by_hand():
    params = {"kernel": jnp.array([1.0, -2.0])}
    optimizer = make_optimizer(lambda _: 0.1, name="lion", b1=0.9, b2=0.5, weight_decay=0.2)
    state = optimizer.init(params)
    _, state = optimizer.update({"kernel": jnp.array([1.0, 1.0])}, state, params)
    # The moment is 0.5: with 0.1 of the new gradient, 0.45 + 0.1 g.
    updates, _ = optimizer.update({"kernel": jnp.array([-4.0, -5.0])}, state, params)
    np.testing.assert_allclose(updates["kernel"], [-0.1 * (1 + 0.2), -0.1 * (-1 - 0.4)], rtol=1e-5)


def orthogonalised(matrix):
    """Five steps of Newton and Schulz's quintic iteration, with the coefficients of Muon's authors."""
    x = matrix / np.linalg.norm(matrix)
    if tall := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
    return x.T if tall else x


def test_muon_by_hand():
    """Two steps of a matrix, of two stacked ones, and of what is not a matrix of a block."""
    rng = np.random.default_rng(0)
    names = {"fc1": (6, 4), "proj": (2, 4, 6), "proj_l": (2, 2), "head": (6, 3)}
    params, first, second = (
        {name: {"kernel": rng.normal(size=shape)} for name, shape in names.items()}
        for _ in range(3)
    )
    with jax.enable_x64(True):
        optimizer = make_optimizer(lambda _: 0.1, name="muon", eps=1e-3, weight_decay=0.3)
        state = optimizer.init(params)
        _, state = optimizer.update(first, state, params)
        updates, _ = optimizer.update(second, state, params)
    for name in names:
        g1, g2, p = first[name]["kernel"], second[name]["kernel"], params[name]["kernel"]
        if name in ("fc1", "proj"):
            momentum = 0.95 * (0.05 * g1) + 0.05 * g2
            mixed = 0.95 * momentum / (1 - 0.95**3) + 0.05 * g2 / (1 - 0.95**2)
            matrices = mixed.reshape(-1, *mixed.shape[-2:])
            step = np.stack([orthogonalised(matrix) for matrix in matrices]).reshape(g1.shape)
            step *= 0.2 * np.sqrt(6)
        else:
            m = (0.1 * 0.9 * g1 + 0.1 * g2) / (1 - 0.9**2)
            v = (0.001 * 0.999 * g1**2 + 0.001 * g2**2) / (1 - 0.999**2)
            step = m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(updates[name]["kernel"], -0.1 * (step + 0.3 * p), rtol=1e-6)


def test_muon_takes_the_matrices_of_the_blocks():
    model = create_model("cait_nano4_patch4_8", num_classes=3)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 8, 8, 1)))["params"]
    taken = {path for path, label in leaf_paths(labels(params))[0] if label == "muon"}
    kernels = {path for path, _ in leaf_paths(params)[0] if path.endswith("kernel")}
    left = {"patch_embed/proj/kernel", "head/kernel"}
    mixing = {path for path in kernels if "/proj_l/" in path or "/proj_w/" in path}
    assert mixing
    assert taken == kernels - left - mixing


def test_an_unknown_optimizer_is_named_with_those_that_exist():
    with pytest.raises(UserError, match="no optimizer 'adam'; nearest: adamw"):
        make_optimizer(lambda _: 1.0, name="adam")
