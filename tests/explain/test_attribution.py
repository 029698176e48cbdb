"""Attribution against loops in numpy, finite differences, and its axioms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from marks import slow_unless

import cait_jax
from cait_jax import UserError
from cait_jax.explain import attention, attribution
from cait_jax.models.cait import CaiT
from cait_jax.models.vit import VisionTransformer

SIZES = {"image_size": (32, 48), "width": 16, "depth": 2, "num_heads": 2, "num_classes": 5}
NETWORKS = [
    {},
    {"talking_heads": False},
    {"stacked": False, "class_depth": 1},
    {"class_token": "input", "distilled": True, "talking_heads": False, "residual": "plain"},
    {"class_token": 1},
    {"class_token": "mean"},
    {"registers": 2, "class_position": False},
    {"mean_pool": True, "registers": 1},
]
CLASSES = jnp.array([3, 0])


def network(**attributes):
    family = VisionTransformer if "registers" in attributes else CaiT
    model = family(**SIZES, layer_scale_init=1.0, **attributes)
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = model.init(jax.random.key(0), images)
    variables = jax.tree.map(
        lambda p: p + 0.3 * jax.random.normal(jax.random.key(p.size), p.shape), variables
    )
    return model, variables, images


def read_out(model, products, of_class):
    """Rows of explicit products of matrices over all tokens, for one image.

    `products` and `of_class` are the blocks' matrices, identity included; those of class attention have one row.
    """
    patches = products[0].shape[0] - attention.special_tokens(model)[0]
    total = np.eye(products[0].shape[0])
    for matrix in products:
        if matrix.shape[0] > total.shape[0]:  # a class token joins in front
            grown = np.eye(matrix.shape[0])
            grown[1:, 1:] = total
            total = grown
        total = matrix @ total
    if of_class:
        grown = np.eye(1 + patches)
        grown[1:, 1:] = total
        total = grown
        for row in of_class:
            whole = np.eye(1 + patches)
            whole[0] = row[0]
            total = whole @ total
        read = total[0]
    elif model.distilled:
        read = (total[0] + total[1]) / 2
    elif model.class_token == "mean":
        read = total.mean(axis=0)
    elif getattr(model, "mean_pool", False):
        read = total[-patches:].mean(axis=0)
    else:
        read = total[0]
    return read[-patches:].reshape(2, 3)


@pytest.mark.parametrize("attributes", slow_unless(lambda a: not a, NETWORKS), ids=str)
def test_rollout_is_the_product_of_its_matrices(attributes):
    model, variables, images = network(**attributes)
    _, inside = cait_jax.forward_intermediates(model, variables, images)
    found = attribution.rollout(model, variables, images, CLASSES)
    for i in range(2):
        blocks = []
        for maps in attention.self_attention(model, inside):
            tokens = maps.shape[-1]
            matrix = np.zeros((tokens, tokens))
            for q in range(tokens):
                row = np.mean([np.abs(maps[i, h, q]) for h in range(2)], axis=0, dtype=np.float64)
                matrix[q] = row / row.sum() / 2
                matrix[q, q] += 0.5
            blocks.append(matrix)
        of_class = []
        for maps in attention.class_attention(model, inside):
            row = np.float64(maps[i, :, 0]).mean(axis=0) / 2
            row[0] += 0.5
            of_class.append(row[None])
        expected = read_out(model, blocks, of_class)
        np.testing.assert_allclose(found[i], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("attributes", slow_unless(lambda a: not a, NETWORKS), ids=str)
def test_relevance_is_the_product_of_its_matrices(attributes):
    model, variables, images = network(**attributes)
    _, inside, slopes = attribution.forward_gradients(model, variables, images, CLASSES)
    found = attribution.relevance(model, variables, images, CLASSES)
    assert np.abs(found).max() > 1e-4
    for i in range(2):
        blocks, of_class = [], []
        for into, stage in (
            (blocks, attention.self_attention),
            (of_class, attention.class_attention),
        ):
            for maps, slope in zip(stage(model, inside), stage(model, slopes), strict=True):
                positive = [
                    np.maximum(np.float64(maps[i, h]) * np.float64(slope[i, h]), 0)
                    for h in range(2)
                ]
                matrix = np.mean(positive, axis=0)
                matrix[np.arange(len(matrix)), np.arange(len(matrix))] += 1
                into.append(matrix)
        expected = read_out(model, blocks, of_class)
        np.testing.assert_allclose(found[i], expected, rtol=2e-5, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize("attributes", [{}, {"talking_heads": False, "stacked": False}], ids=str)
def test_gradients_of_attention_are_slopes(attributes):
    """The gradient of a map, times a change of it, is the change of the class logit (central differences)."""
    with jax.enable_x64(True):
        model, variables, images = network(**attributes, dtype=jnp.float64, param_dtype=jnp.float64)
        images = images.astype(jnp.float64)
        variables = jax.tree.map(lambda p: p.astype(jnp.float64), variables)
        _, _, slopes = attribution.forward_gradients(model, variables, images, CLASSES)
        name = "mixed_softmax" if model.talking_heads else "softmax"
        change = jax.random.normal(jax.random.key(5), (2, 2, 6, 6), jnp.float64)
        of_class = jax.random.normal(jax.random.key(6), (2, 2, 1, 7), jnp.float64)

        def logit(step):
            zeros = jnp.zeros_like(change)
            layers = [zeros, step * change]
            blocks = (
                {"blocks": {"attn": {name: jnp.stack(layers)}}}
                if model.stacked
                else {f"blocks_{i}": {"attn": {name: layer}} for i, layer in enumerate(layers)}
            )
            blocks["blocks_token_only_0"] = {"attn": {"softmax": step * of_class}}
            logits, _ = cait_jax.forward_intermediates(
                model, {**variables, "perturbations": blocks}, images
            )
            return logits[jnp.arange(2), CLASSES]

        numeric = (logit(1e-5) - logit(-1e-5)) / 2e-5
        exact = (attention.self_attention(model, slopes)[1] * change).sum((1, 2, 3))
        exact += (attention.class_attention(model, slopes)[0] * of_class).sum((1, 2, 3))
        np.testing.assert_allclose(exact, numeric, rtol=1e-7)


def test_perturbations_of_zero_change_no_bit():
    model, variables, images = network()
    plain, _ = cait_jax.forward_intermediates(model, variables, images)
    logits, inside, _ = attribution.forward_gradients(model, variables, images, CLASSES)
    np.testing.assert_allclose(logits, plain, rtol=1e-6, atol=1e-6)
    assert set(variables) == {"params"} == set(model.init(jax.random.key(0), images))
    assert inside["blocks"]["mixed_softmax"].shape == (2, 2, 2, 6, 6)


@pytest.mark.slow
def test_integrated_gradients_add_up_to_the_logit():
    model, variables, images = network()
    found = attribution.integrated_gradients(model, variables, images, CLASSES, steps=400)
    logits = model.apply(variables, images) - model.apply(variables, jnp.zeros_like(images))
    np.testing.assert_allclose(
        found.sum((1, 2)), logits[jnp.arange(2), CLASSES], rtol=2e-3, atol=2e-3
    )


def test_input_gradient_of_a_linear_network_is_exact():
    """Where the logit is linear in the image, gradient x input adds up to it, for any class."""

    class Linear(CaiT):
        @nn.compact
        def __call__(self, images, train=False, example_ids=None):
            weight = self.param("w", jax.nn.initializers.normal(1.0), (*images.shape[1:], 5))
            return jnp.einsum("bhwc,hwck->bk", images, weight)

    model = Linear(**SIZES)
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = model.init(jax.random.key(0), images)
    logits = model.apply(variables, images)[jnp.arange(2), CLASSES]
    for method in ("input_gradient", "integrated_gradients"):
        found = attribution.attribute(method, model, variables, images, CLASSES)
        assert found.shape == (2, 2, 3)
        np.testing.assert_allclose(found.sum((1, 2)), logits, rtol=1e-4)


@pytest.mark.slow
def test_every_method_runs_at_any_resolution_in_jit():
    larger = CaiT(**{**SIZES, "image_size": (64, 32)}, class_token="input", residual="plain")
    images = jax.random.normal(jax.random.key(2), (1, 64, 32, 3))
    variables = larger.init(jax.random.key(0), images)
    for method in attribution.METHODS:
        run = jax.jit(lambda v, x, c, m=method: attribution.attribute(m, larger, v, x, c))
        found = run(variables, images, jnp.array([1]))
        assert found.shape == (1, 4, 2)
        assert bool(jnp.isfinite(found).all())


def test_an_unknown_method_names_those_there_are():
    model, variables, images = network()
    with pytest.raises(UserError, match="no method 'gradcam': class_attention, rollout"):
        attribution.attribute("gradcam", model, variables, images, CLASSES)
    regnet = cait_jax.create_model("regnety_160")
    with pytest.raises(UserError, match="convolutional network without attention"):
        attribution.attribute("rollout", regnet, {}, images, CLASSES)
