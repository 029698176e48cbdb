import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.metrics import confusion_matrix, log_loss, top_k_accuracy_score

from cait_jax import UserError
from cait_jax.evaluation.evaluate import loss_and_accuracy, means, zero_sums
from cait_jax.evaluation.metrics import any_of_labels, classification, compute_scores

COUNT, CLASSES = 400, 7
NAMES = [f"class {i}" for i in range(CLASSES)]


@pytest.fixture(scope="module")
def random():
    rng = np.random.default_rng(0)
    logits = (2 * rng.standard_normal((COUNT, CLASSES))).astype(np.float32)
    labels = rng.integers(0, CLASSES, COUNT)
    labels[:150] = logits[:150].argmax(-1)
    return logits, labels


def softmax(logits):
    exponentials = np.exp(np.float64(logits))
    return exponentials / exponentials.sum(-1, keepdims=True)


def scores(logits, labels, mask=None, metric_fn=classification):
    logits = jnp.asarray(logits, jnp.float32)
    mask = np.ones(len(logits), bool) if mask is None else mask
    key = "labels" if np.ndim(labels) == 2 else "label"
    dtype = bool if key == "labels" else np.int32
    batch = {key: jnp.asarray(np.asarray(labels, dtype)), "mask": jnp.asarray(mask)}
    sums = jax.device_get(jax.jit(metric_fn)(logits, batch))
    return compute_scores(sums, NAMES[: logits.shape[1]])


def calibration_error(confidence, right, bins=15):
    """Guo et al. 2017, equation 3, bin by bin."""
    error = 0.0
    for m in range(1, bins + 1):
        inside = (confidence > (m - 1) / bins) & (confidence <= m / bins)
        if inside.any():
            gap = abs(right[inside].mean() - confidence[inside].mean())
            error += inside.mean() * gap
    return error


def test_every_number_is_that_of_scikit_learn(random):
    logits, labels = random
    found = scores(logits, labels)
    probabilities = softmax(logits)
    classes = range(CLASSES)
    matrix = confusion_matrix(labels, logits.argmax(-1), labels=classes)
    assert found["images"] == found["counted"] == COUNT
    assert found["not_finite"] == 0
    assert found["top1"] == top_k_accuracy_score(labels, probabilities, k=1, labels=classes)
    assert found["top5"] == top_k_accuracy_score(labels, probabilities, k=5, labels=classes)
    assert found["loss"] == pytest.approx(log_loss(labels, probabilities), rel=1e-6)
    right = logits.argmax(-1) == labels
    expected = calibration_error(probabilities.max(-1), right)
    assert expected > 0.05
    assert found["ece"] == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(found["confusion"], matrix)
    np.testing.assert_array_equal(found["class_images"], matrix.sum(1))
    np.testing.assert_allclose(found["class_accuracy"], np.diag(matrix) / matrix.sum(1))
    assert found["class_names"] == NAMES
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_the_cheap_metric_fn_agrees(random):
    logits, labels = random
    batch = {"label": jnp.asarray(labels), "mask": jnp.arange(COUNT) < 300}
    found = means(jax.jit(loss_and_accuracy)(jnp.asarray(logits), batch))
    assert found["accuracy"] == np.mean(logits.argmax(-1)[:300] == labels[:300])
    expected = log_loss(labels[:300], softmax(logits[:300]), labels=range(CLASSES))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_padding_and_images_without_a_label_do_not_count(random):
    logits, labels = random
    padded = np.concatenate([logits, np.full((9, CLASSES), 50, np.float32)])
    unlabelled = np.concatenate([labels, [2] * 4, [-1] * 5])
    mask = np.ones(COUNT + 9, bool)
    mask[COUNT : COUNT + 4] = False
    found = scores(padded, unlabelled, mask)
    expected = scores(logits, labels)
    assert found.pop("images") == expected.pop("images") + 5
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-6)
    assert found == expected


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_not_numbers_are_never_right(broken):
    logits = np.tile(np.arange(3.0), (4, 1))
    logits[1, 0] = broken  # the label's own
    logits[2, 1] = broken
    found = scores(logits, [2, 0, 2, 2])
    assert found["not_finite"] == 2
    assert (found["top1"], found["top5"]) == (2 / 4, None)
    assert found["class_images"] == [1, 0, 3]
    assert found["class_accuracy"] == [0.0, None, 2 / 3]
    assert found["confusion"] == [[0, 0, 0], [0, 0, 0], [0, 0, 2]]
    assert found["loss"] is None
    assert found["ece"] == pytest.approx(1 - softmax(np.arange(3.0))[2])
    batch = {"label": jnp.array([2, 0, 2, 2]), "mask": jnp.ones(4, bool)}
    assert means(jax.jit(loss_and_accuracy)(jnp.asarray(logits), batch))["accuracy"] == 2 / 4


def test_all_logits_broken_leave_no_calibration():
    found = scores(np.full((2, 3), np.nan), [0, 1])
    assert (found["top1"], found["ece"], found["loss"]) == (0.0, None, None)


def test_ties_go_to_the_lower_index():
    found = scores(np.zeros((7, 7)), np.arange(7))
    assert found["top1"] == 1 / 7
    assert found["top5"] == 5 / 7
    assert np.asarray(found["confusion"])[:, 0].tolist() == [1] * 7


@pytest.mark.parametrize(("classes", "known"), [(4, False), (5, False), (6, True)])
def test_of_five_classes_or_fewer_the_top_five_say_nothing(random, classes, known):
    logits, labels = random
    assert (scores(logits[:, :classes], labels % classes)["top5"] is not None) == known


def test_bfloat16_logits_are_summed_in_float32(random):
    logits, labels = random
    rounded = jnp.asarray(logits, jnp.bfloat16)
    batch = {"label": jnp.asarray(labels), "mask": jnp.ones(COUNT, bool)}
    found = compute_scores(jax.jit(classification)(rounded, batch), NAMES)
    expected = log_loss(labels, softmax(np.asarray(rounded, np.float32)))
    assert found["loss"] == pytest.approx(expected, rel=1e-6)


def test_any_of_the_labels_is_right(random):
    logits, _ = random
    labels = np.random.default_rng(1).random((COUNT, CLASSES)) < 0.25
    found = scores(logits, labels, metric_fn=any_of_labels)
    labelled = labels.any(-1)
    assert 20 < (~labelled).sum() < 100
    right = labels[np.arange(COUNT), logits.argmax(-1)]
    assert (found["images"], found["counted"]) == (COUNT, labelled.sum())
    assert found["top1"] == right[labelled].mean()
    expected = calibration_error(softmax(logits).max(-1)[labelled], right[labelled])
    assert found["ece"] == pytest.approx(expected, rel=1e-5)
    for key in ("top5", "loss", "confusion", "class_images", "class_accuracy"):
        assert found[key] is None
    json.dumps(found, allow_nan=False)


def test_any_of_labels_with_logits_that_are_not_numbers():
    logits = [[0.0, np.nan], [0.0, 1.0]]
    found = scores(logits, [[True, True], [False, True]], metric_fn=any_of_labels)
    assert (found["top1"], found["not_finite"]) == (0.5, 1)


@pytest.mark.parametrize("metric_fn", [loss_and_accuracy, classification, any_of_labels])
def test_zero_sums_have_the_dtypes_of_the_sums(metric_fn, random):
    batch = {
        "label": jnp.zeros(3, jnp.int32),
        "labels": jnp.zeros((3, CLASSES), bool),
        "mask": jnp.ones(3, bool),
    }
    sums = jax.jit(metric_fn)(jnp.asarray(random[0][:3]), batch)
    zeros = zero_sums(metric_fn, CLASSES)
    jax.tree.map(
        lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), zeros, sums
    )
    assert not any(leaf.any() for leaf in jax.tree.leaves(zeros))


def test_nothing_that_counts():
    with pytest.raises(UserError, match="no image of the split has a label"):
        scores(np.zeros((2, 3)), [-1, -1])
    with pytest.raises(UserError, match="no image of the split has a label"):
        means(zero_sums(loss_and_accuracy, 3))
