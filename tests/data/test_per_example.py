"""A function of every image: keys by position, in turn or at once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.data.per_example import for_each_example


def shifted(key, image):
    return image + jax.random.uniform(key)


jitted = jax.jit(functools.partial(for_each_example, shifted))


def test_keys_are_those_of_the_positions():
    images, ids, key = jnp.zeros((3, 2, 2, 1)), jnp.array([5, 0, 5]), jax.random.key(2)
    found = jitted(key, images, ids)
    for i, position in enumerate(ids):
        expected = jax.random.uniform(jax.random.fold_in(key, position))
        np.testing.assert_array_equal(found[i], jnp.full((2, 2, 1), expected))


@pytest.mark.parametrize(("platform", "in_turn"), [("cpu", True), ("cuda", False), ("tpu", False)])
def test_only_a_cpu_takes_image_after_image(platform, in_turn):
    def doubled(_, image):
        return 2.0 * image

    traced = jax.jit(functools.partial(for_each_example, doubled)).trace(
        jax.random.key(0), jnp.zeros((3, 2, 2, 1)), jnp.arange(3)
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == in_turn
