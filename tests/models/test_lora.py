"""Low-rank adapters of the blocks' matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same_bits, random_params

from cait_jax import create_model
from cait_jax.models import lora
from cait_jax.models.inspect import macs_of

ALPHA, RANK = 6.0, 2
SMALL = {"depth": 3, "width": 16, "num_heads": 2, "num_classes": 3, "precision": "highest"}
NETWORKS = [
    ("cait_nano4_patch4_8", {}),
    ("cait_nano4_patch4_8", {"stacked": False, "residual": "fixup", "block_norm": False}),
    ("cait_nano4_patch4_8", {"remat": "block"}),
    ("vit_6x256", {"distilled": True, "swiglu": True}),
]


def network(name="cait_nano4_patch4_8", **options):
    size = {"image_size": 8, "in_channels": 1, "patch_size": 4}
    model = create_model(name, **{**SMALL, **size, **options})
    return model, random_params(model)


def images(count=4):
    return jnp.asarray(np.random.default_rng(0).standard_normal((count, 8, 8, 1)), jnp.float32)


def with_b(adapters):
    """Adapters whose B is no longer 0."""
    rng = np.random.default_rng(3)
    fill = lambda leaf: jnp.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(fill, adapters)


def adapted_logits(model, joined, batch):
    with lora.adapted(ALPHA):
        return model.apply({"params": joined}, batch)


@pytest.mark.parametrize(("name", "options"), NETWORKS)
def test_adapters_add_nothing_at_first_and_then_what_merging_adds(name, options):
    model, params = network(name, **options)
    base = model.apply({"params": params}, images())
    adapters = lora.init(jax.random.key(0), params, RANK)
    np.testing.assert_array_equal(
        adapted_logits(model, lora.join(params, adapters), images()), base
    )

    joined = lora.join(params, with_b(adapters))
    found = adapted_logits(model, joined, images())
    assert np.abs(found - base).max() > 0.01
    merged = lora.merge(joined, ALPHA)
    assert jax.tree.structure(merged) == jax.tree.structure(params)
    np.testing.assert_allclose(model.apply({"params": merged}, images()), found, atol=2e-5)
    np.testing.assert_array_equal(model.apply({"params": joined}, images()), base)  # outside


@pytest.mark.parametrize("stacked", [True, False])
def test_every_matrix_of_the_blocks_changes_by_the_rank_and_nothing_else_does(stacked):
    _, params = network(stacked=stacked)
    adapters = lora.init(jax.random.key(0), params, RANK)
    merged = lora.merge(lora.join(params, with_b(adapters)), ALPHA)
    changed = set()
    leaves = jax.tree_util.tree_leaves_with_path(merged)
    for (path, after), before in zip(leaves, jax.tree.leaves(params), strict=True):
        names = tuple(key.key for key in path)
        if names[0].startswith("blocks") and names[-1] == "kernel" and names[-2] in lora.LAYERS:
            update = np.float64(after) - np.float64(before)
            for matrix in update if update.ndim == 3 else [update]:
                values = np.linalg.svd(matrix, compute_uv=False)
                assert values[RANK - 1] > 1e-2
                assert values[RANK:].max() < 1e-5
            changed.add(names[-3:-1])
        else:
            assert_same_bits(after, before)
    heads = {("attn", name) for name in ("qkv", "q", "k", "v", "proj")}
    assert changed == heads | {("mlp", "fc1"), ("mlp", "fc2")}


def test_their_number_and_start():
    _, params = network()
    adapters = lora.init(jax.random.key(0), params, RANK)
    width, hidden, depth, class_depth = 16, 64, 3, 2
    of_mlp = 2 * RANK * (width + hidden)
    block = RANK * (width + 3 * width) + RANK * 2 * width + of_mlp
    class_block = 4 * RANK * 2 * width + of_mlp
    count = sum(leaf.size for leaf in jax.tree.leaves(adapters))
    assert count == depth * block + class_depth * class_block
    qkv = adapters["blocks"]["attn"]["qkv"]
    assert qkv["lora_a"].shape == (depth, width, RANK)
    assert qkv["lora_b"].shape == (depth, RANK, 3 * width)
    wide = lora.init(jax.random.key(1), {"blocks": {"fc1": {"kernel": jnp.zeros((400, 8))}}}, 100)
    assert np.std(wide["blocks"]["fc1"]["lora_a"]) == pytest.approx(400**-0.5, rel=0.02)
    seeds = [
        a["blocks"]["mlp"]["fc1"]["lora_a"]
        for a in (adapters, lora.init(jax.random.key(2), params, RANK))
    ]
    assert np.abs(seeds[0] - seeds[1]).max() > 0.1
    assert np.abs(seeds[0] - adapters["blocks"]["mlp"]["fc2"]["lora_a"][:, :16]).max() > 0.1


@pytest.mark.parametrize(("name", "options"), NETWORKS[:2])
def test_the_gradient_is_that_through_the_dense_matrix(name, options):
    model, params = network(name, **options)
    adapters = with_b(lora.init(jax.random.key(0), params, RANK))
    joined = lora.join(params, adapters)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal((4, 3)), jnp.float32)

    def loss(logits):
        return (weights * jnp.square(logits)).sum()

    found = jax.grad(lambda a: loss(adapted_logits(model, lora.join(params, a), images())))(
        adapters
    )
    dense = jax.grad(lambda p: loss(model.apply({"params": p}, images())))(
        lora.merge(joined, ALPHA)
    )
    scale = ALPHA / RANK
    for path, gradient in jax.tree_util.tree_leaves_with_path(found):
        layer, other = dense, adapters
        for key in path[:-1]:
            layer, other = layer[key.key], other[key.key]
        of_w = np.float64(layer["kernel"])
        if path[-1].key == "lora_a":  # W = A B: dA = dW B^T
            expected = scale * of_w @ np.float64(other["lora_b"]).swapaxes(-1, -2)
        else:
            expected = scale * np.float64(other["lora_a"]).swapaxes(-1, -2) @ of_w
        size = np.abs(expected).max()
        assert size > 0
        np.testing.assert_allclose(gradient, expected, rtol=0, atol=2e-4 * size)


def test_matrices_of_low_precision_are_merged_in_float32():
    rng = np.random.default_rng(0)
    params = {"fc1": {"kernel": jnp.asarray(rng.standard_normal((8, 8)), jnp.bfloat16)}}
    adapters = with_b(lora._init(jax.random.key(0), params, RANK))
    merged = lora.merge(lora.join(params, adapters), ALPHA)["fc1"]["kernel"]
    a, b = (np.float32(adapters["fc1"][name]) for name in ("lora_a", "lora_b"))
    expected = jnp.asarray(np.float32(params["fc1"]["kernel"]) + ALPHA / RANK * a @ b, jnp.bfloat16)
    assert merged.dtype == jnp.bfloat16
    assert_same_bits(merged, expected)


def test_no_gradient_of_a_frozen_matrix_is_computed():
    model, params = network(width=64)

    def operations(function, learnt):
        return macs_of(jax.make_jaxpr(jax.grad(function))(learnt).jaxpr)

    adapters = lora.init(jax.random.key(0), params, 1)
    low = operations(
        lambda a: adapted_logits(model, lora.join(params, a), images()).sum(), adapters
    )
    dense = operations(lambda p: model.apply({"params": p}, images()).sum(), params)
    assert low < 0.8 * dense
