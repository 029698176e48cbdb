"""Multiply-accumulates against the published figures and a count by hand."""

import jax
import jax.numpy as jnp
import pytest

from cait_jax import create_model
from cait_jax.models.inspect import macs, macs_of, parameter_count

# timm's table, in GMACs. It counts norms and the like too, which is less than half a per cent.
PUBLISHED = {
    "cait_xxs24_224": 2.53,
    "cait_xxs24_384": 9.63,
    "cait_xxs36_224": 3.77,
    "cait_xxs36_384": 14.35,
    "cait_xs24_384": 19.28,
    "cait_s24_224": 9.35,
    "cait_s24_384": 32.17,
    "cait_s36_384": 47.99,
    "cait_m36_384": 173.1,
    "cait_m48_448": 329.4,
}


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_macs_of_the_released_models(name):
    assert 0.995 * PUBLISHED[name] < macs(create_model(name)) / 1e9 <= 1.0005 * PUBLISHED[name]


@pytest.mark.parametrize("stacked", [True, False])
def test_macs_by_hand(stacked):
    model = create_model("cait_xxs24", depth=3, num_classes=7, image_size=64, stacked=stacked)
    d, n, heads = 192, 16, 4
    patches = n * 16 * 16 * 3 * d
    block = n * (3 * d * d + d * d + 8 * d * d) + 2 * n * n * d + 2 * n * n * heads * heads
    of_class = 2 * d * d + 2 * (n + 1) * d * d + 2 * (n + 1) * d + 8 * d * d
    assert macs(model) == patches + 3 * block + 2 * of_class + 7 * d


def test_a_gradient_costs_two_forward_passes_and_no_product_twice():
    model = create_model("cait_xxs24", depth=3, num_classes=7, image_size=64, attention="xla")
    images = jnp.zeros((1, 64, 64, 3))
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    gradient = jax.grad(lambda variables: model.apply(variables, images).sum())
    once = macs(model)
    patches = 16 * 16 * 16 * 3 * 192  # images have no gradient
    assert macs_of(jax.make_jaxpr(gradient)(variables).jaxpr) == 3 * once - patches


def test_macs_of_a_grouped_convolution_and_its_parameters():
    model = create_model("regnety_160")
    assert 15.8e9 < macs(model) < 16.0e9  # 16 GF by name
    assert parameter_count(model) == 83_590_140
