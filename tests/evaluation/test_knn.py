import jax
import numpy as np
import pytest
from sklearn.neighbors import KNeighborsClassifier

from cait_jax import UserError
from cait_jax.evaluation import features, knn_accuracy, knn_predict


@pytest.fixture(scope="module")
def clusters():
    """Five overlapping clusters: training and test features and labels."""
    rng = np.random.default_rng(0)
    centres = rng.standard_normal((5, 12))
    labels = rng.integers(0, 5, 400)
    features = (centres[labels] + 1.2 * rng.standard_normal((400, 12))).astype(np.float32)
    return features[:300], labels[:300], features[300:], labels[300:]


@pytest.mark.parametrize(("k", "temperature"), [(20, 0.07), (1, 0.07), (300, 1.0), (20, 1e-4)])
def test_predictions_are_those_of_scikit_learn(clusters, k, temperature):
    train, labels, test, test_labels = clusters
    reference = KNeighborsClassifier(
        k,
        metric="cosine",
        algorithm="brute",
        weights=lambda distance: np.exp((distance.min(1, keepdims=True) - distance) / temperature),
    ).fit(np.float64(train), labels)
    expected = reference.predict(np.float64(test))
    found = knn_predict(train, labels, test, k=k, temperature=temperature)
    np.testing.assert_array_equal(found, expected)
    accuracy = knn_accuracy(train, labels, test, test_labels, k=k, temperature=temperature)
    assert accuracy == np.mean(expected == test_labels)
    assert 0.2 < accuracy < 1


def test_chunks_and_devices_change_nothing(clusters, monkeypatch):
    train, labels, test, _ = clusters
    expected = knn_predict(train, labels, test, devices=jax.devices()[:1], batch_size=100)
    monkeypatch.setattr(features, "_BANK_CHUNK", 64)
    found = knn_predict(train, labels, test, devices=jax.devices()[:3], batch_size=7)
    np.testing.assert_array_equal(found, expected)


def test_scale_does_not_matter_and_a_zero_vector_is_no_error(clusters):
    train, labels, test, _ = clusters
    expected = knn_predict(train, labels, test)
    scale = np.random.default_rng(1).uniform(1e-3, 1e3, (len(train), 1)).astype(np.float32)
    np.testing.assert_array_equal(knn_predict(train * scale, labels, 7 * test), expected)
    zeros = np.zeros((1, 12), np.float32)
    assert knn_predict(train, labels, zeros, k=1) == labels[0]


def test_ties_go_to_the_lower_index_and_then_to_the_lower_label():
    same = np.ones((6, 3), np.float32)
    labels = np.array([4, 1, 4, 1, 0, 0])
    assert knn_predict(same, labels, same[:1], k=3) == [4]
    assert knn_predict(same, labels, same[:1], k=4) == [1]


def test_unfit_arguments(clusters):
    train, labels, test, _ = clusters
    for k in (0, 301):
        with pytest.raises(UserError, match=f"k is {k}, .* from 1 to 300"):
            knn_predict(train, labels, test, k=k)
    with pytest.raises(UserError, match="no test examples"):
        knn_predict(train, labels, test[:0])
