"""The arrays of a report against the functions that they are made of."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from report_pages import network as model_of
from trees import random_params

from cait_jax import forward_intermediates
from cait_jax.explain import attention, attribution
from cait_jax.explain.faithfulness import deletion_insertion
from cait_jax.explain.report.look import (
    CLASS_FREE,
    class_specials,
    look,
    map_kinds,
    self_attention_values,
)

pytestmark = pytest.mark.slow
EXTRA = (0, 6)


@functools.cache
def network(name):
    """(model, variables)."""
    model = model_of(name)
    return model, {"params": random_params(model)}


@functools.cache
def images():
    return np.random.default_rng(3).normal(size=(2, 64, 64, 3)).astype(np.float32)


@functools.cache
def looked(name, head_means=False):
    """The arrays of two images."""
    model, variables = network(name)
    extra = EXTRA if model.num_classes else ()
    function = look(model, top=3, extra=extra, head_means=head_means, steps=4)
    return jax.tree.map(np.asarray, jax.jit(function)(variables, images()))


@pytest.mark.parametrize("name", ["cait", "distilled", "late", "headless"])
def test_self_attention_is_of_every_layer_and_head_before_and_after_mixing(name):
    model, variables = network(name)
    _, inside = forward_intermediates(model, variables, images())
    assert map_kinds(model) == (("weights", "mixed_weights") if name == "cait" else ("weights",))
    found, means = looked(name), looked(name, head_means=True)
    size = 0
    for kind in map_kinds(model):
        layers = attention.self_attention(model, inside, kind)
        for at, expected in enumerate(layers):
            np.testing.assert_allclose(found["self"][kind][at], expected, atol=1e-6)
            mean = expected.mean(axis=1, keepdims=True)
            np.testing.assert_allclose(means["self"][kind][at], mean, atol=1e-6)
            size += found["self"][kind][at][0].size
    assert self_attention_values(model, head_means=False) == size
    assert self_attention_values(model, head_means=True) == size // model.num_heads


@pytest.mark.parametrize("name", ["cait", "distilled", "late"])
def test_class_rows_are_the_class_tokens_with_special_tokens_in_front(name):
    model, variables = network(name)
    _, inside = forward_intermediates(model, variables, images())
    for kind in map_kinds(model):
        rows = looked(name)["class_rows"][kind]
        assert len(rows) == len(class_specials(model))
        patches = [
            row[..., special:] for row, special in zip(rows, class_specials(model), strict=True)
        ]
        expected = attention.class_token_maps(model, inside, kind)
        expected = expected.reshape(*expected.shape[:3], -1)
        np.testing.assert_allclose(np.stack(patches), expected, atol=1e-6)


@pytest.mark.parametrize("name", ["cait", "distilled", "late"])
def test_maps_and_curves_are_those_of_each_method_and_class(name):
    model, variables = network(name)
    found = looked(name)
    logits = model.apply(variables, images())
    best = np.asarray(jax.lax.top_k(logits, 3)[1])
    np.testing.assert_array_equal(found["classes"], np.concatenate([best, [EXTRA] * 2], axis=1))
    probabilities = np.take_along_axis(np.asarray(jax.nn.softmax(logits)), found["classes"], axis=1)
    np.testing.assert_allclose(found["probabilities"], probabilities, rtol=1e-4)

    for place in (0, 4):
        classes = jnp.asarray(found["classes"][:, place])
        rows = {name: row for row, name in enumerate(CLASS_FREE[:2])}
        rows["relevance"] = len(CLASS_FREE) + place
        for method, row in rows.items():
            maps = attribution.attribute(method, model, variables, images(), classes)
            np.testing.assert_allclose(found["maps"][:, row], maps, rtol=1e-4, atol=1e-6)
            given = jnp.asarray(found["maps"][:, row])
            curves = deletion_insertion(model, variables, images(), classes, given, steps=4)
            for curve in ("deletion", "insertion"):
                np.testing.assert_allclose(
                    found[curve][:, row, place], getattr(curves, curve), rtol=1e-3, atol=1e-6
                )


def test_a_network_without_a_head_has_maps_and_no_classes():
    found = looked("headless")
    assert found["classes"].shape == (2, 0)
    assert found["maps"].shape == (2, len(CLASS_FREE), 2, 2)
    assert "deletion" not in found
