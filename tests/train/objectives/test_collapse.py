"""Entropies of a teacher's outputs, and the warning of a collapse."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.train.objectives import collapse


def distribution(params, features):
    return jax.nn.softmax(features @ params)


@pytest.mark.parametrize("count", [3, 1024, 1500])
def test_entropies_are_of_all_images(count):
    rng = np.random.default_rng(0)
    params = rng.normal(size=(5, 7)).astype(np.float32)
    features = rng.normal(size=(count, 5)).astype(np.float32)
    found = collapse.output_entropies(distribution, params, features)
    logits = np.float64(features) @ np.float64(params)
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    mean = p.mean(0)
    expected = {
        "teacher_entropy": -(p * np.log(p)).sum(1).mean(),
        "mean_entropy": -(mean * np.log(mean)).sum(),
    }
    assert found == pytest.approx(expected, rel=1e-5)


OUTPUTS = 8
SAME = np.array([0.5, 0.2, 0.1, 0.1, 0.05, 0.03, 0.01, 0.01])


@pytest.mark.parametrize(
    ("outputs", "sentence"),
    [
        (
            np.tile(np.eye(OUTPUTS)[3], (16, 1)),
            "peaked at one dimension, the same for every image .* lower --config.dino.center_m",
        ),
        (
            np.full((16, OUTPUTS), 1 / OUTPUTS),
            "nearly uniform for every image .* lower --config.dino.teacher_temp",
        ),
        (
            np.tile(SAME, (16, 1)),
            "is the same for every image .* larger --config.dino.global_scale, or",
        ),
        (np.eye(OUTPUTS)[np.arange(16) % OUTPUTS], None),
    ],
)
def test_a_collapse_is_named(outputs, sentence, caplog):
    logits = np.log(np.maximum(outputs, 1e-9)).astype(np.float32)
    found = collapse.output_entropies(distribution, jnp.eye(OUTPUTS), logits)
    collapse.warn_of_same_outputs(**found, outputs=OUTPUTS)
    if sentence is None:
        assert not caplog.text
    else:
        assert len(caplog.records) == 1
        assert re.search(sentence, caplog.text)


def test_entropies_that_are_not_finite_are_no_collapse(caplog):
    collapse.warn_of_same_outputs(float("nan"), float("nan"), OUTPUTS)
    assert not caplog.text


def test_equal_features_are_named(caplog):
    features = np.ones((20, 4)) + 1e-4 * np.random.default_rng(0).normal(size=(20, 4))
    std, rank = collapse.feature_std(features), collapse.feature_rank(features)
    collapse.warn_of_same_features(20, std, rank)
    assert "20 images have nearly the same features (feature_std 0.000" in caplog.text
    caplog.clear()
    spread = np.eye(4)[np.arange(20) % 4]
    assert collapse.feature_rank(spread) == pytest.approx(4.0)
    collapse.warn_of_same_features(20, collapse.feature_std(spread), 4.0)
    assert not caplog.text
