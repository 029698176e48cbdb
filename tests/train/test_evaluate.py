"""Evaluation counts every example once, for batch sizes and device counts that divide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import create_model
from cait_jax.data.augment import normalise
from cait_jax.data.pipeline import eval_batches
from cait_jax.data.sources import InMemory
from cait_jax.train.evaluate import evaluate, make_eval_step
from cait_jax.train.losses import cross_entropy
from cait_jax.sharding import make_mesh, over_batch

COUNT = 53


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    split = InMemory(
        images=rng.integers(0, 256, (COUNT, 8, 8, 1), dtype=np.uint8),
        labels=rng.integers(0, 3, COUNT, dtype=np.int32),
        class_names=("a", "b", "c"),
    )
    model = create_model("cait_nano4_patch4_8", num_classes=3, depth=1, precision="highest")
    return split, model, random_params(model)


@pytest.mark.parametrize(("batch_size", "devices"), [(53, 1), (10, 1), (16, 8), (64, 8), (24, 3)])
def test_every_example_counts_once(problem, batch_size, devices):
    split, model, params = problem
    logits = model.apply({"params": params}, normalise(jnp.asarray(split.images), (0.5,), (0.5,)))
    step = jax.jit(make_eval_step(model, (0.5,), (0.5,)))
    found = evaluate(
        step,
        params,
        eval_batches(split, batch_size=batch_size, image_size=(8, 8)),
        over_batch(make_mesh(jax.devices()[:devices])),
    )
    right = int((np.asarray(logits).argmax(-1) == split.labels).sum())
    assert 0 < right < COUNT
    assert found["accuracy"] == right / COUNT
    losses = np.float64(cross_entropy(logits, jnp.asarray(split.labels)))
    assert found["loss"] == pytest.approx(losses.mean(), rel=2e-6)
