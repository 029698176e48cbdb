"""Patches and their embeddings."""

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.explain import patches
from cait_jax.models.cait import CaiT

MODEL = CaiT(image_size=(32, 48), width=16, depth=1, num_heads=2, num_classes=5)


def test_filters_times_patches_are_the_embedding():
    images = jax.random.normal(jax.random.key(1), (2, 32, 48, 3))
    variables = MODEL.init(jax.random.key(0), images)
    cut = patches.cut_patches(images, 16)
    assert cut.shape == (2, 6, 768)
    np.testing.assert_array_equal(cut[1, 4].reshape(16, 16, 3), images[1, 16:32, 16:32])
    filters = patches.embedding_filters(MODEL, variables)
    assert filters.shape == (16, 16, 16, 3)
    _, state = MODEL.apply(
        variables, images, capture_intermediates=lambda m, _: m.name == "patch_embed"
    )
    embedded = state["intermediates"]["patch_embed"]["__call__"][0]
    bias = variables["params"]["patch_embed"]["proj"]["bias"]
    found = cut @ filters.reshape(16, -1).T + bias[None, None]
    np.testing.assert_allclose(found, embedded, rtol=1e-4, atol=1e-5)


def test_principal_filters_find_the_directions_that_filters_have():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(48, 2)))[0].T.astype(np.float32)
    weights = rng.normal(size=(10, 2)).astype(np.float32) * np.array([3.0, 1.0], np.float32)
    filters = jnp.array((weights @ axes).reshape(10, 4, 4, 3))
    components, share = patches.principal_filters(filters, 3)
    np.testing.assert_allclose(share[:2].sum(), 1.0, rtol=1e-5)
    np.testing.assert_allclose(share[2], 0.0, atol=1e-6)
    inside = components[:2].reshape(2, 48) @ axes.T
    np.testing.assert_allclose(np.linalg.norm(inside, axis=1), 1.0, rtol=1e-4)


def test_position_similarity_leaves_out_special_tokens():
    model = CaiT(
        image_size=(32, 48), width=16, depth=1, num_heads=2, class_token="input", residual="plain"
    )
    embedding = np.random.default_rng(0).normal(size=(1, 7, 16)).astype(np.float32)
    found = patches.position_similarity(model, {"params": {"pos_embed": jnp.array(embedding)}})
    a, b = embedding[0, 1 + 1], embedding[0, 1 + 5]
    expected = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found[0, 1, 1, 2], expected, rtol=1e-5)
    np.testing.assert_allclose(found[1, 1, 1, 1], 1.0, rtol=1e-6)
