import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.train.losses import correct, cross_entropy


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.5])
def test_cross_entropy_is_the_formula(smoothing):
    logits = 3 * jax.random.normal(jax.random.key(0), (5, 7))
    labels = jnp.array([0, 6, 3, 3, 1])
    targets = np.full((5, 7), smoothing / 7)
    targets[np.arange(5), labels] += 1 - smoothing
    x = np.asarray(logits, np.float64)
    log_probabilities = x - np.log(np.exp(x).sum(1, keepdims=True))
    expected = -(targets * log_probabilities).sum(1)
    np.testing.assert_allclose(cross_entropy(logits, labels, smoothing), expected, atol=1e-5)


def test_correct_counts_the_largest_logit():
    logits = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_array_equal(correct(logits, jnp.array([1, 1])), [1.0, 0.0])
