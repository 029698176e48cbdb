"""Losses against their formulas in float64."""

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.train.config import get_config
from cait_jax.train.objectives.distillation import hard_distillation, soft_distillation
from cait_jax.train.objectives.supervised import binary_cross_entropy, correct, cross_entropy

RNG = np.random.default_rng(0)
LOGITS = np.float32(3 * RNG.standard_normal((5, 7)))
TEACHER = np.float32(3 * RNG.standard_normal((5, 7)))
MIXED = np.float32(RNG.dirichlet(np.ones(7), 5))
LABELS = jnp.array([0, 6, 3, 3, 1])


def log_softmax(x):
    x = np.asarray(x, np.float64)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def smoothed(smoothing):
    targets = np.full((5, 7), smoothing / 7)
    targets[np.arange(5), LABELS] += 1 - smoothing
    return targets


HARD = jnp.asarray(smoothed(0.0), jnp.float32)


@pytest.mark.parametrize("targets", [MIXED, np.float32(smoothed(0.1)), np.float32(smoothed(0.0))])
def test_cross_entropy_is_the_formula(targets):
    expected = -(targets * log_softmax(LOGITS)).sum(1)
    found = cross_entropy(jnp.asarray(LOGITS), jnp.asarray(targets))
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("targets", [MIXED, np.float32(smoothed(0.1))])
def test_binary_cross_entropy_is_the_formula(targets, threshold):
    x = np.float64(LOGITS)
    y = targets if threshold is None else targets > threshold
    expected = -(y * -np.log1p(np.exp(-x)) + (1 - y) * -np.log1p(np.exp(x)))
    logits, targets = jnp.asarray(LOGITS), jnp.asarray(targets)
    found = binary_cross_entropy(logits, targets, threshold)
    np.testing.assert_allclose(found, expected.mean(1), atol=1e-6)
    found = binary_cross_entropy(logits, targets, threshold, sum_classes=True)
    np.testing.assert_allclose(found, expected.sum(1), rtol=1e-6)


def test_a_target_at_the_threshold_is_below_it():
    logits = jnp.array([[100.0, -100.0]])
    targets = jnp.array([[0.51, 0.5]])
    np.testing.assert_allclose(binary_cross_entropy(logits, targets, 0.5), [0.0], atol=1e-6)


def test_binary_cross_entropy_of_great_logits_is_finite_with_its_gradient():
    logits = jnp.array([[1e4, -1e4]])
    targets = jnp.array([[0.0, 1.0]])
    value, gradient = jax.value_and_grad(lambda x: binary_cross_entropy(x, targets).sum())(logits)
    np.testing.assert_allclose(value, 1e4)
    np.testing.assert_allclose(gradient, [[0.5, -0.5]])


def test_hard_distillation_on_one_head_and_on_two():
    logits, teacher = jnp.asarray(LOGITS), jnp.asarray(TEACHER)
    other = np.float32(RNG.standard_normal((5, 7)))
    chosen, rows = TEACHER.argmax(1), np.arange(5)
    of_label = -log_softmax(LOGITS)[rows, LABELS]
    of_teacher = {
        name: -log_softmax(x)[rows, chosen] for name, x in [("one", LOGITS), ("two", other)]
    }
    base = cross_entropy(logits, HARD)
    np.testing.assert_allclose(
        hard_distillation(base, logits, teacher), (of_label + of_teacher["one"]) / 2, rtol=1e-5
    )
    np.testing.assert_allclose(
        hard_distillation(base, jnp.asarray(other), teacher, weight=0.3),
        0.7 * of_label + 0.3 * of_teacher["two"],
        rtol=1e-5,
    )


@pytest.mark.parametrize(("temperature", "weight"), [(3.0, 0.1), (1.0, 1.0), (0.5, 0.7)])
def test_soft_distillation_is_the_formula(temperature, weight):
    student, teacher = (log_softmax(np.float64(x) / temperature) for x in (LOGITS, TEACHER))
    divergence = (np.exp(teacher) * (teacher - student)).sum(1)
    of_label = -log_softmax(LOGITS)[np.arange(5), LABELS]
    logits = jnp.asarray(LOGITS)
    found = soft_distillation(
        cross_entropy(logits, HARD), logits, jnp.asarray(TEACHER), temperature, weight
    )
    expected = (1 - weight) * of_label + weight * temperature**2 * divergence
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_soft_distillation_defaults_to_the_published_code_everywhere():
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(soft_distillation).parameters.items()
        if parameter.default is not inspect.Parameter.empty
    }
    assert defaults == {"temperature": 1.0, "weight": 0.5}
    config = get_config().distill
    assert (config.temperature, config.alpha) == (1.0, 0.5)
    docs = (Path(__file__).parents[3] / "docs" / "recipe.md").read_text()
    assert "temperature 1 and weight 0.5" in docs
    assert "temperature 1 and weight 0.5" in soft_distillation.__doc__


@pytest.mark.parametrize("loss", [hard_distillation, soft_distillation])
def test_no_gradient_reaches_the_teacher(loss):
    gradient = jax.grad(lambda teacher: loss(jnp.zeros(5), jnp.asarray(LOGITS), teacher).sum())
    np.testing.assert_array_equal(gradient(jnp.asarray(TEACHER)), np.zeros((5, 7)))


def test_a_student_that_agrees_with_its_teacher_has_no_divergence():
    logits = jnp.asarray(LOGITS)
    found = soft_distillation(jnp.zeros(5), logits, logits + 5, weight=1.0)
    np.testing.assert_allclose(found, np.zeros(5), atol=1e-5)


def test_correct_counts_the_largest_logit():
    logits = jnp.array([[1.0, 2.0], [3.0, 2.0]])
    np.testing.assert_array_equal(correct(logits, jnp.array([1, 1])), [1.0, 0.0])
