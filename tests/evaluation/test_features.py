import jax
import jax.numpy as jnp
import numpy as np
import pytest
from linear import MEAN, STD, linear_logits
from trees import random_params

from cait_jax import create_model
from cait_jax.augment.pipeline import normalise
from cait_jax.data.loader import eval_batches
from cait_jax.data.split import InMemory
from cait_jax.evaluation import extract_features
from cait_jax.sharding import make_mesh

COUNT = 29


@pytest.fixture(scope="module")
def split():
    rng = np.random.default_rng(0)
    return InMemory(
        images=rng.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8),
        labels=rng.integers(0, 5, COUNT, dtype=np.int32),
        class_names=tuple("abcde"),
    )


def batches(split, batch_size):
    return eval_batches(split, batch_size=batch_size, image_size=(8, 8))


@pytest.mark.parametrize(("batch_size", "devices"), [(29, 1), (16, 8), (6, 3)])
def test_a_row_an_image_in_order_without_padding(split, batch_size, devices):
    weights = np.random.default_rng(1).standard_normal((64, 7)).astype(np.float32)
    shown = []
    features, labels = extract_features(
        None,
        {"params": weights},
        batches(split, batch_size),
        mean=MEAN,
        std=STD,
        feature_fn=lambda model, variables, images: (
            images.reshape(len(images), -1) @ variables["params"]
        ),
        mesh=make_mesh(jax.devices()[:devices]),
        progress=shown.append,
    )
    assert (features.dtype, features.shape) == (np.float32, (COUNT, 7))
    np.testing.assert_allclose(features, linear_logits(weights, split.images), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(labels, split.labels)
    assert sum(shown) == COUNT


def test_by_default_what_the_head_reads(split):
    model = create_model("cait_nano4_patch4_8", depth=1, num_classes=5, precision="highest")
    variables = {"params": random_params(model)}
    features, _ = extract_features(model, variables, batches(split, 32), mean=MEAN, std=STD)
    assert features.shape == (COUNT, 64)
    head = variables["params"]["head"]
    logits = jax.jit(model.apply)(variables, normalise(jnp.asarray(split.images), MEAN, STD))
    np.testing.assert_allclose(
        features @ np.asarray(head["kernel"]) + np.asarray(head["bias"]), logits, atol=2e-4
    )


def test_no_batch():
    with pytest.raises(ValueError, match="no batch"):
        extract_features(None, {}, [], mean=MEAN, std=STD)
