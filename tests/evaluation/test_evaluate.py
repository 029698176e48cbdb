"""Evaluation counts every example once, for batch sizes and device counts that divide nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import log_loss
from trees import random_params

from cait_jax import create_model
from cait_jax.augment.pipeline import normalise
from cait_jax.data.loader import eval_batches
from cait_jax.data.split import InMemory
from cait_jax.evaluation.evaluate import (
    evaluate,
    jit_eval_step,
    loss_and_accuracy,
    make_eval_step,
    means,
    zero_sums,
)
from cait_jax.sharding import batch_sharding, make_mesh

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
    variables = {"params": random_params(model)}
    images = normalise(jnp.asarray(split.images), (0.5,), (0.5,))
    return split, model, variables, np.float64(jax.jit(model.apply)(variables, images))


@pytest.mark.parametrize(("batch_size", "devices"), [(53, 1), (10, 1), (16, 8), (64, 8), (24, 3)])
def test_every_example_counts_once_in_one_compilation(problem, batch_size, devices):
    split, model, variables, logits = problem
    mesh = make_mesh(jax.devices()[:devices])
    step = jit_eval_step(make_eval_step(model, (0.5,), (0.5,), loss_and_accuracy), mesh)
    shown = []
    sums = evaluate(
        step,
        variables,
        eval_batches(split, batch_size=batch_size, image_size=(8, 8)),
        batch_sharding(mesh),
        zero_sums(loss_and_accuracy, 3),
        shown.append,
    )
    right = int((logits.argmax(-1) == split.labels).sum())
    assert 0 < right < COUNT
    found = means(sums)
    assert found["accuracy"] == right / COUNT
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    assert found["loss"] == pytest.approx(log_loss(split.labels, probabilities), rel=2e-6)
    assert step._cache_size() == 1
    assert len(shown) == -(-COUNT // batch_size)
    assert sum(shown) == COUNT


def test_the_device_gets_no_more_than_one_batch_ahead(monkeypatch):
    """Else a fast reader would fill its memory."""
    waited = []
    monkeypatch.setattr(jax, "block_until_ready", waited.append)
    batches = [{"mask": np.ones(1, bool)}] * 4
    steps = iter(range(1, 5))
    evaluate(
        lambda variables, batch, sums: np.int32(next(steps)),
        {},
        batches,
        batch_sharding(make_mesh(jax.devices()[:1])),
        np.int32(0),
    )
    assert waited == [0, 1, 2, 3]
