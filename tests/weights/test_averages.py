"""Averages of parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax import UserError
from cait_jax.train.step import moving_average
from cait_jax.weights.adapt import mean_params


def tree(seed, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    return {
        "head": {"kernel": jnp.asarray(rng.standard_normal((3, 2)), dtype)},
        "norm": {"scale": jnp.asarray(rng.standard_normal(3), dtype)},
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_mean_is_that_of_float64_in_the_parameters_dtype(dtype):
    trees = [tree(seed, dtype) for seed in range(7)]
    mean = mean_params(iter(trees))
    expected = np.mean([np.asarray(t["head"]["kernel"], np.float64) for t in trees], axis=0)
    assert mean["head"]["kernel"].dtype == dtype
    np.testing.assert_array_equal(mean["head"]["kernel"], expected.astype(dtype))


def test_the_mean_of_one_is_itself():
    jax.tree.map(np.testing.assert_array_equal, mean_params([tree(0)]), tree(0))


def test_trees_that_do_not_fit_each_other():
    with pytest.raises(UserError, match="nothing to average"):
        mean_params([])
    other = tree(1)
    other["head"]["kernel"] = jnp.zeros((3, 4))
    with pytest.raises(
        UserError, match=r"tree 2 .*head/kernel is float32 \(3, 4\) and was float32 \(3, 2\)"
    ):
        mean_params([tree(0), other])
    with pytest.raises(UserError, match="head/kernel is bfloat16"):
        mean_params([tree(0), tree(1, jnp.bfloat16)])
    with pytest.raises(UserError, match=r"tree 3 .*it lacks norm/scale"):
        mean_params([tree(0), tree(1), {"head": tree(2)["head"]}])
    with pytest.raises(UserError, match="it alone has norm/scale"):
        mean_params([{"head": tree(2)["head"]}, tree(0)])


def test_the_moving_average_is_the_formula():
    average = moving_average(tree(0), tree(1), 0.9)
    expected = 0.9 * np.float64(tree(0)["norm"]["scale"]) + 0.1 * np.float64(
        tree(1)["norm"]["scale"]
    )
    np.testing.assert_allclose(average["norm"]["scale"], expected, rtol=1e-6)


def test_the_moving_average_of_what_stands_still_keeps_its_bits():
    still = {"kernel": jnp.asarray([*np.random.default_rng(0).standard_normal(500), -0.0, 1e-42])}
    average = still
    move = jax.jit(moving_average, static_argnums=2)
    for _ in range(20):
        average = move(average, still, 0.99996)
    assert np.asarray(average["kernel"]).tobytes() == np.asarray(still["kernel"]).tobytes()
