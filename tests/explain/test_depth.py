"""Statistics by layer against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_unless

from cait_jax.explain import attention, depth
from cait_jax.explain.overview import overview
from cait_jax.models.cait import CaiT, ClassAttentionBlock, SelfAttentionBlock

SIZES = {"image_size": (32, 32), "width": 16, "depth": 2, "num_heads": 2, "num_classes": 5}


def test_entropy_is_that_of_known_rows():
    uniform, certain = np.full((1, 1, 4, 4), 0.25, np.float32), np.eye(4, dtype=np.float32)
    weights = jnp.concatenate([uniform, certain[None, None]], axis=1)
    found = depth.attention_entropy(weights)
    np.testing.assert_allclose(found, [np.log(4), 0.0], rtol=1e-6, atol=0)
    rows = np.random.default_rng(0).dirichlet(np.ones(7), (3, 2, 7)).astype(np.float32)
    expected = np.mean(
        [[-(r * np.log(r)).sum() for r in rows[:, h].reshape(-1, 7)] for h in (0, 1)], 1
    )
    np.testing.assert_allclose(depth.attention_entropy(jnp.array(rows)), expected, rtol=1e-5)


@pytest.mark.parametrize("special", [0, 2])
def test_distance_is_in_pixels(special):
    model = CaiT(**SIZES)  # 2 x 2 patches of 16 pixels
    n = 4 + special
    maps = np.zeros((1, 3, n, n), np.float32)
    maps[0, 0] = np.eye(n)
    maps[0, 1] = 1 / n
    maps[0, 2, :, special + 3] = 1.0  # all read the last
    found = depth.attention_distance(model, jnp.array(maps))
    diagonal = 16 * np.sqrt(2)
    np.testing.assert_allclose(
        found, [0, (16 + 16 + diagonal) / 4, (16 + 16 + diagonal) / 4], rtol=1e-6
    )


def test_shares_on_tokens():
    maps = np.zeros((2, 1, 5, 5), np.float32)
    maps[..., 0], maps[0, ..., 2], maps[1, ..., 4] = 0.25, 0.75, 0.75
    np.testing.assert_allclose(depth.share_on_special(jnp.array(maps)), [0.25])
    np.testing.assert_allclose(depth.share_on_most_read(jnp.array(maps), 1), [0.75])
    maps[..., 0], maps[..., 2], maps[..., 4] = 0.9, 0.05, 0.05
    np.testing.assert_allclose(depth.share_on_most_read(jnp.array(maps)), [0.9])
    np.testing.assert_allclose(depth.share_on_most_read(jnp.array(maps), 1), [0.05])


def test_cka_ignores_rotation_shift_and_scale():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(50, 8)).astype(np.float32)
    rotation = np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    rotated = 3.0 * features @ rotation + 1.0
    np.testing.assert_allclose(depth.cka(jnp.array(features), jnp.array(rotated)), 1.0, rtol=1e-5)
    other = rng.normal(size=(50, 5)).astype(np.float32)
    gram = [
        (c := x - x.mean(0)) @ c.T for x in (features.astype(np.float64), other.astype(np.float64))
    ]
    expected = (gram[0] * gram[1]).sum() / np.linalg.norm(gram[0]) / np.linalg.norm(gram[1])
    assert expected < 0.5
    np.testing.assert_allclose(
        depth.cka(jnp.array(features), jnp.array(other)), expected, rtol=1e-4
    )
    matrix = depth.cka_matrix([jnp.array(features), jnp.array(other)])
    np.testing.assert_allclose(matrix, [[1, expected], [expected, 1]], rtol=1e-4)


@pytest.mark.parametrize(
    "attributes",
    slow_unless(
        lambda a: not a,
        [
            {},
            {"stacked": False, "remat": "block"},
            {"residual": "rezero", "block_norm": False},
            {"residual": "fixup"},
            {"residual": "plain", "class_token": "input"},
            {"class_token": 1},
            {"class_mlp_ratio": 0.0},
        ],
    ),
    ids=str,
)
def test_branch_ratio_is_that_of_block_inputs_and_outputs(attributes):
    """With one branch of a block silenced, the other's norm is that of the block's output less its input."""
    model = CaiT(**{**SIZES, **attributes})
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    variables = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), variables
    )

    def silenced(part):
        def edit(path, leaf):
            names = [key.key for key in path]
            return leaf * 0 if part in names and names[-2] in ("proj", "fc2") else leaf

        return jax.tree_util.tree_map_with_path(edit, variables)

    for column, other in ((0, "mlp"), (1, "attn")):
        given = silenced(other)
        found = depth.branch_ratio(model, given, images)
        for row, (x, y) in enumerate(blocks_of(model, given, images)):
            if model.class_mlp_ratio == 0.0 and row >= model.depth and column:
                assert np.isnan(found[row, 1])
                continue
            norms = np.linalg.norm(y - x, axis=-1) / np.linalg.norm(x, axis=-1)
            np.testing.assert_allclose(found[row, column], norms.mean(), rtol=2e-4)


def blocks_of(model, variables, images):
    """Input and output of every block, by running them outside of any scan."""
    seen = []

    def keep(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, SelfAttentionBlock | ClassAttentionBlock):
            seen.append((np.asarray(args[0]), np.asarray(result)))
        return result

    import flax.linen as nn
    from trees import unstack_blocks

    if model.stacked:
        variables = {"params": unstack_blocks(variables["params"])}
    with nn.intercept_methods(keep):
        model.clone(stacked=False, remat="none").apply(variables, images)
    return [pair for pair in seen if pair[0].ndim == 3]


@pytest.mark.slow
def test_overview_is_by_image():
    """What is shown of an image does not depend on the images beside it."""
    model = CaiT(**SIZES, layer_scale_init=1.0)
    images = jax.random.normal(jax.random.key(1), (3, 32, 32, 3))
    variables = model.init(jax.random.key(0), images)
    show = ("attribution", "attention", "patch", "matrices", "depth", "patches")
    function = jax.jit(overview(model, show, methods=("rollout", "relevance"), steps=2))
    whole, alone = function(variables, images), function(variables, images[1:2])
    assert set(whole["attribution"]) == {"rollout", "relevance", "random", "centre"}
    assert whole["deletion"]["rollout"].shape == (3, 1, 3)
    assert whole["cka"].shape == (3, 2, 2)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[1:2], b, rtol=2e-3, atol=1e-5), whole, alone
    )
    assert attention.patch_grid(model) == (2, 2)
    assert int(whole["patch"][0]) == 3
