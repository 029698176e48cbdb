"""A function of every image: keys by position, in turn or at once."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.augment.pipeline import per_example_vmap
from cait_jax.sharding import batch_sharding, constrain_batch, make_mesh


def shifted(key, image):
    return image + jax.random.uniform(key)


jitted = jax.jit(functools.partial(per_example_vmap, shifted))


def test_keys_are_those_of_the_positions():
    images, ids, key = jnp.zeros((3, 2, 2, 1)), jnp.array([5, 0, 5]), jax.random.key(2)
    found = jitted(key, images, ids)
    for i, position in enumerate(ids):
        expected = jax.random.uniform(jax.random.fold_in(key, position))
        np.testing.assert_array_equal(found[i], jnp.full((2, 2, 1), expected))


@pytest.mark.parametrize(
    ("platform", "shapes"),
    [("cpu", {"2x2x1"}), ("tpu", {"8x2x2x1", "3x2x2x1"}), ("cuda", {"19x2x2x1"})],
)
def test_images_at_a_time(platform, shapes):
    def cosine(_, image):
        return jnp.cos(image)

    traced = jax.jit(functools.partial(per_example_vmap, cosine)).trace(
        jax.random.key(0), jnp.zeros((19, 2, 2, 1)), jnp.arange(19)
    )
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert set(re.findall(r"stablehlo.cosine %\w+ : tensor<(\w+)xf32>", text)) == shapes


def test_on_a_mesh_each_device_has_its_own_images():
    mesh = make_mesh(jax.devices()[:4], data=2, fsdp=2)
    images = jax.random.uniform(jax.random.key(0), (8, 2, 2, 1))
    ids, key = jnp.arange(8), jax.random.key(2)
    function = constrain_batch(functools.partial(per_example_vmap, shifted), mesh)
    lies = batch_sharding(mesh)
    divided = jax.jit(function, in_shardings=(None, lies, lies), out_shardings=lies)
    compiled = divided.lower(key, images, ids).compile()
    assert "all-gather" not in compiled.as_text()
    np.testing.assert_array_equal(
        compiled(key, *jax.device_put((images, ids), lies)), jitted(key, images, ids)
    )
