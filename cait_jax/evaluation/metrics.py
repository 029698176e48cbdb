"""Top-1, top-5, calibration and per-class metrics of `cait evaluate`.

Each metric function gives sums over the examples with `mask` True and a label; `compute_scores` divides them.
Where logits tie, the class of the lower index comes first. Logits that are not finite (NaN, or infinities that
leave no probabilities) are never right; `not_finite` counts them.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Num

from cait_jax.errors import UserError
from cait_jax.evaluation.evaluate import Batch, Labels, Logits, cross_entropy

CALIBRATION_BINS = 15
TOP = 5


def classification(logits: Logits, batch: Batch) -> dict[str, Any]:
    """Metric function for one label an image: `label` int (batch,), below 0 for none, and `mask` bool (batch,).

    Counts are int32. `confusion` is (true classes, predicted classes), of the images with finite logits.
    """
    label, mask = batch["label"], batch["mask"]
    classes = logits.shape[-1]
    counted = mask & (label >= 0)
    logits = logits.astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits)
    finite = counted & ~jnp.isnan(log_probabilities).any(axis=-1)
    rank = _rank(logits, label)
    # An index past the end drops the example.
    true = jnp.where(finite, label, classes)
    per_class = jnp.zeros(classes, jnp.int32)
    confusion = jnp.zeros((classes, classes), jnp.int32)
    return {
        "images": mask.sum(),
        "counted": counted.sum(),
        "not_finite": (counted & ~finite).sum(),
        "loss": jnp.where(counted, cross_entropy(log_probabilities, label), 0.0).sum(),
        "top1": (finite & (rank < 1)).sum(),
        "top5": (finite & (rank < TOP)).sum(),
        "calibration": _calibration(log_probabilities, finite, rank < 1),
        "class_images": per_class.at[jnp.where(counted, label, classes)].add(1, mode="drop"),
        "confusion": confusion.at[true, jnp.argmax(logits, axis=-1)].add(1, mode="drop"),
    }


def any_of_labels(logits: Logits, batch: Batch) -> dict[str, Any]:
    """Metric function for images with any number of labels: `labels` bool (batch, classes), `mask` bool (batch,).

    ReaL accuracy (Beyer et al. 2020, arXiv 2006.07159): the top-1 class is right if it is among the labels, and an
    image without labels does not count.
    """
    labels, mask = batch["labels"], batch["mask"]
    counted = mask & labels.any(axis=-1)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    finite = counted & ~jnp.isnan(log_probabilities).any(axis=-1)
    predicted = jnp.argmax(logits, axis=-1)
    right = jnp.take_along_axis(labels, predicted[:, None], axis=-1)[:, 0]
    return {
        "images": mask.sum(),
        "counted": counted.sum(),
        "not_finite": (counted & ~finite).sum(),
        "top1": (finite & right).sum(),
        "calibration": _calibration(log_probabilities, finite, right),
    }


def compute_scores(sums: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Scores from the sums of `classification` or `any_of_labels` over all examples.

    Returns:
      A JSON-serialisable dict; what the metric function did not sum is None:
        `images`, `counted`, `not_finite`: the images, those with a label, over which every mean is taken, and of
          these those whose logits are not finite;
        `top1`, `top5`: accuracy, 0 to 1; `top5` is None for 5 classes or fewer;
        `loss`: mean cross-entropy in nats; None where it is not finite;
        `ece`: expected calibration error of the top-1 confidence in 15 bins of equal width, closed on the right
          (Guo et al. 2017, arXiv 1706.04599, equation 3), of the images with finite logits;
        `class_names`, `class_images`, `class_accuracy`: for each class its name, its images and their accuracy,
          None for a class without images;
        `confusion`: for each true class, how many images were predicted as each class.

    Raises:
      UserError: no image counts.
    """
    counted = int(sums["counted"])
    if not counted:
        raise UserError("no image of the split has a label; choose a split with labels")

    scores: dict[str, Any] = {
        "images": int(sums["images"]),
        "counted": counted,
        "not_finite": int(sums["not_finite"]),
        "top1": int(sums["top1"]) / counted,
        "top5": int(sums["top5"]) / counted if "top5" in sums and len(class_names) > TOP else None,
        "loss": None,
        "ece": _expected_calibration_error(sums["calibration"]),
        "class_names": list(class_names),
        "class_images": None,
        "class_accuracy": None,
        "confusion": None,
    }
    if "loss" in sums:
        loss = float(sums["loss"]) / counted
        scores["loss"] = loss if math.isfinite(loss) else None
    if "confusion" in sums:
        confusion, images = np.asarray(sums["confusion"]), np.asarray(sums["class_images"])
        scores["class_images"] = images.tolist()
        scores["class_accuracy"] = [
            right / total if total else None
            for right, total in zip(np.diag(confusion).tolist(), images.tolist(), strict=True)
        ]
        scores["confusion"] = confusion.tolist()
    return scores


def _rank(logits: Logits, label: Labels) -> Labels:
    """How many classes come before the label's."""
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1])[None] < label[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(axis=-1)


def _calibration(
    log_probabilities: Logits, finite: Bool[Array, "batch"], right: Bool[Array, "batch"]
) -> dict[str, Num[Array, "bins"]]:
    """Images, right ones and the sum of confidences, by bin of the top-1 confidence."""
    confidence = jnp.exp(log_probabilities.max(axis=-1))
    # Bin m of M is ((m - 1) / M, m / M].
    index = jnp.ceil(confidence * CALIBRATION_BINS).astype(jnp.int32) - 1
    index = jnp.clip(index, 0, CALIBRATION_BINS - 1)
    inside = finite[:, None] & (index[:, None] == jnp.arange(CALIBRATION_BINS)[None])
    return {
        "images": inside.sum(axis=0),
        "right": (inside & right[:, None]).sum(axis=0),
        "confidence": jnp.where(inside, confidence[:, None], 0.0).sum(axis=0),
    }


def _expected_calibration_error(calibration: Mapping[str, Any]) -> float | None:
    images = np.asarray(calibration["images"], np.float64)
    if not images.sum():
        return None
    gaps = np.abs(calibration["right"] - np.asarray(calibration["confidence"], np.float64))
    return float(gaps.sum() / images.sum())
