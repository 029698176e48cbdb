"""Trees of arrays: parameters far from their start values, and the comparison of bits."""

import re

import jax
import jax.numpy as jnp
import numpy as np


def random_params(model, seed=0):
    """The `params` tree of a model: gammas and norm scales near 1, all else normal, std 0.3."""
    images = jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)
    template = jax.eval_shape(model.init, jax.random.key(0), images)["params"]
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        near_one = path[-1].key in ("gamma", "scale")
        return jnp.asarray(near_one + 0.3 * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, template)


def assert_same_bits(found, expected):
    """Asserts that two trees have the same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert a.tobytes() == b.tobytes()


def unstack_blocks(params):
    """Splits the parameters `blocks` of a model with `stacked=True` into `blocks_0`, `blocks_1`, ..."""
    rest = {name: value for name, value in params.items() if name != "blocks"}
    depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    single = {
        f"blocks_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"])
        for i in range(depth)
    }
    return rest | single


def stack_blocks(params):
    """Joins the parameters `blocks_0`, `blocks_1`, ... into `blocks`: the inverse of `unstack_blocks`."""
    names = sorted(
        (name for name in params if re.fullmatch(r"blocks_\d+", name)),
        key=lambda name: int(name[7:]),
    )
    rest = {name: value for name, value in params.items() if name not in names}
    blocks = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(params[name] for name in names))
    return rest | {"blocks": blocks}
