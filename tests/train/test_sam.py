"""Sharpness-aware gradients, by hand."""

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.train.step import uphill


def loss(params, scale, aux=0.0):
    value = scale * (params["a"] ** 4).sum() + (params["b"] ** 2).sum()
    return value, aux


GRADIENT_OF = jax.value_and_grad(loss, has_aux=True)
PARAMS = {"a": jnp.array([1.0, -0.5]), "b": jnp.array([[2.0]])}


def test_the_gradient_is_taken_uphill_at_distance_rho():
    (value, aux), gradient = GRADIENT_OF(PARAMS, 2.0, aux=7.0)
    _, gradient = GRADIENT_OF(uphill(PARAMS, gradient, 0.3), 2.0, aux=7.0)
    a, b = np.array([1.0, -0.5]), np.array([2.0])
    ascent = np.concatenate([2 * 4 * a**3, 2 * b])
    ascent *= 0.3 / np.linalg.norm(ascent)
    np.testing.assert_allclose(value, 2 * (a**4).sum() + (b**2).sum(), rtol=1e-6)
    assert aux == 7.0
    np.testing.assert_allclose(gradient["a"], 8 * (a + ascent[:2]) ** 3, rtol=1e-5)
    np.testing.assert_allclose(gradient["b"], [2 * (b + ascent[2:])], rtol=1e-5)


def test_without_a_distance_it_is_the_plain_gradient():
    there = uphill(PARAMS, GRADIENT_OF(PARAMS, 2.0)[1], 0.0)
    jax.tree.map(np.testing.assert_array_equal, there, PARAMS)


def test_where_the_gradient_is_zero_it_stays_zero():
    params = jax.tree.map(jnp.zeros_like, PARAMS)
    _, gradient = jax.jit(GRADIENT_OF)(params, 1.0)
    there = jax.jit(lambda params, g: uphill(params, g, 0.05))(params, gradient)
    _, gradient = jax.jit(GRADIENT_OF)(there, 1.0)
    for leaf in jax.tree.leaves(gradient):
        np.testing.assert_array_equal(leaf, np.zeros_like(leaf))
