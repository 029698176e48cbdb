import sys

import numpy as np
import pytest
from scipy.optimize import minimize

from cait_jax import UserError
from cait_jax.evaluation import probe_accuracy


@pytest.fixture(scope="module")
def clusters():
    """Three overlapping clusters on very different scales."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 240)
    features = rng.standard_normal((3, 4))[labels] + 0.8 * rng.standard_normal((240, 4))
    features = features * np.array([1e-3, 1.0, 10.0, 1e3]) + 5
    return features[:160], labels[:160], features[160:], labels[160:]


def fitted(train, labels, test, inverse_l2):
    """Penalised multinomial logistic regression, minimised directly."""
    mean, std = train.mean(0), train.std(0)
    x, targets = (train - mean) / std, np.eye(3)[labels]

    def loss(flat):
        weights = flat.reshape(5, 3)
        logits = x @ weights[:4] + weights[4]
        log_probabilities = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -inverse_l2 * (targets * log_probabilities).sum() + (weights[:4] ** 2).sum() / 2

    weights = minimize(loss, np.zeros(15)).x.reshape(5, 3)
    return ((test - mean) / std @ weights[:4] + weights[4]).argmax(1)


@pytest.mark.parametrize("inverse_l2", [1.0, 1e-3])
def test_accuracy_of_the_penalised_fit(clusters, inverse_l2):
    train, labels, test, test_labels = clusters
    expected = np.mean(fitted(train, labels, test, inverse_l2) == test_labels)
    found = probe_accuracy(train, labels, test, test_labels, inverse_l2=inverse_l2)
    assert found == pytest.approx(expected)
    assert 0.5 < found < 1


def test_mistakes(clusters, monkeypatch):
    train, labels, test, test_labels = clusters
    with pytest.raises(UserError, match="have only one"):
        probe_accuracy(train, np.zeros_like(labels), test, test_labels)
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(UserError, match=r'pip install "cait-jax\[probe\]"'):
        probe_accuracy(train, labels, test, test_labels)
