"""What an evaluation sums over examples, and the scores made from the sums.

A measure is a pure function of a batch's logits and of the batch. It gives sums over the examples that count:
those with `mask` True and a label. Added up, they do not depend on how a split was cut into batches.

Where logits tie, the class of the lower index comes first. Logits that are not numbers (NaN, or infinities
that leave no probabilities) are never right; `not_finite` counts them.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num

from cait_jax.errors import UserError

Batch = Mapping[str, Any]
Sums = Any
Measure = Callable[[Array, Batch], Sums]
Logits = Float[Array, "batch classes"]
Labels = Int[Array, "batch"]

BINS = 15
TOP = 5


def loss_and_accuracy(logits: Logits, batch: Batch) -> dict[str, Num[Array, ""]]:
    """The cheap measure, for use while training.

    Args:
      logits: of the model.
      batch: with `label`, int (batch,), and `mask`, bool (batch,).

    Returns:
      The sums `counted`, `loss` (cross-entropy, nats) and `top1` (images whose largest logit is their label's).
    """
    label = batch["label"]
    counted = batch["mask"] & (label >= 0)
    losses = _cross_entropy(jax.nn.log_softmax(logits.astype(jnp.float32)), label)
    right = (jnp.argmax(logits, axis=-1) == label) & ~jnp.isnan(losses)
    return {
        "counted": counted.sum(),
        "loss": jnp.where(counted, losses, 0.0).sum(),
        "top1": (counted & right).sum(),
    }


def classification(logits: Logits, batch: Batch) -> dict[str, Num[Array, "..."]]:
    """The full measure for images with one label each. See `finish` for what the sums give.

    Args:
      logits: of the model.
      batch: with `label`, int (batch,), below 0 where an image has none, and `mask`, bool (batch,).

    Returns:
      Sums: counts are int32, `loss` and `confidence` float32; `confusion` is (classes, classes), rows true and
      columns predicted, and holds the images whose logits are numbers; `class_images` is (classes,).
    """
    label, mask = batch["label"], batch["mask"]
    classes = logits.shape[-1]
    counted = mask & (label >= 0)
    logits = logits.astype(jnp.float32)
    log_probabilities = jax.nn.log_softmax(logits)
    decided = counted & ~_undecided(log_probabilities)
    rank = _rank(logits, label)
    # An index past the end drops the example.
    true = jnp.where(decided, label, classes)
    per_class = jnp.zeros(classes, jnp.int32)
    confusion = jnp.zeros((classes, classes), jnp.int32)
    return {
        "images": mask.sum(),
        "counted": counted.sum(),
        "not_finite": (counted & ~decided).sum(),
        "loss": jnp.where(counted, _cross_entropy(log_probabilities, label), 0.0).sum(),
        "top1": (decided & (rank < 1)).sum(),
        "top5": (decided & (rank < TOP)).sum(),
        "calibration": _calibration(log_probabilities, decided, rank < 1),
        "class_images": per_class.at[jnp.where(counted, label, classes)].add(1, mode="drop"),
        "confusion": confusion.at[true, jnp.argmax(logits, axis=-1)].add(1, mode="drop"),
    }


def any_of_labels(logits: Logits, batch: Batch) -> dict[str, Num[Array, "..."]]:
    """The measure for images with any number of labels: right if the top-1 class is among them.

    This is the ReaL accuracy of Beyer et al. 2020 (arXiv 2006.07159): an image without labels does not count. The
    calibration error takes "right" in the same sense. Cross-entropy, top-5 and the confusion matrix need one
    label an image, so they are left out.

    Args:
      logits: of the model.
      batch: with `labels`, bool (batch, classes), and `mask`, bool (batch,).

    Returns:
      Sums, as of `classification`.
    """
    labels, mask = batch["labels"], batch["mask"]
    counted = mask & labels.any(axis=-1)
    log_probabilities = jax.nn.log_softmax(logits.astype(jnp.float32))
    decided = counted & ~_undecided(log_probabilities)
    predicted = jnp.argmax(logits, axis=-1)
    right = jnp.take_along_axis(labels, predicted[:, None], axis=-1)[:, 0]
    return {
        "images": mask.sum(),
        "counted": counted.sum(),
        "not_finite": (counted & ~decided).sum(),
        "top1": (decided & right).sum(),
        "calibration": _calibration(log_probabilities, decided, right),
    }


def zero_sums(measure: Measure, num_classes: int) -> Any:
    """The sums of no examples, as NumPy arrays of the shapes and dtypes that `measure` gives.

    Args:
      measure: a measure of this module or one like it.
      num_classes: the number of logits of an image.
    """
    batch = {
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
        "labels": jax.ShapeDtypeStruct((1, num_classes), jnp.bool_),
        "mask": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    sums = jax.eval_shape(measure, jax.ShapeDtypeStruct((1, num_classes), jnp.float32), batch)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sums)


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """The scores of `loss_and_accuracy`: `loss` (mean, nats) and `accuracy` (0 to 1)."""
    count = int(sums["counted"])
    if not count:
        raise UserError("no image of the split has a label; choose a split with labels")
    return {"loss": float(sums["loss"]) / count, "accuracy": int(sums["top1"]) / count}


def finish(sums: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any]:
    """Makes scores of sums. What the measure did not sum is None.

    Args:
      sums: of `classification` or `any_of_labels`, over all examples.
      class_names: the names of the classes that the logits stand for, in their order.

    Returns:
      A dict that `json.dumps` takes:
        `images`, `counted`, `not_finite`: how many images there were, how many of them had a label and so
          count in every mean, and how many of these had logits that are not numbers;
        `top1`, `top5`: the share of images whose label is among the 1 or 5 largest logits; `top5` is None where 5
          classes or fewer compete, of which every one would be among the 5;
        `loss`: mean cross-entropy in nats; None where it is not finite;
        `ece`: expected calibration error of the top-1 confidence in 15 bins of equal width, closed on the right
          (Guo et al. 2017, arXiv 1706.04599, equation 3), of the images whose logits are numbers;
        `class_names`, `class_images`, `class_accuracy`: for each class its name, its images and the share of
          them that is right, None for a class without images;
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
        "loss": _finite(float(sums["loss"]) / counted) if "loss" in sums else None,
        "ece": _expected_calibration_error(sums["calibration"]),
        "class_names": list(class_names),
        "class_images": None,
        "class_accuracy": None,
        "confusion": None,
    }
    if "confusion" in sums:
        confusion, images = np.asarray(sums["confusion"]), np.asarray(sums["class_images"])
        scores["class_images"] = images.tolist()
        scores["class_accuracy"] = [
            right / total if total else None
            for right, total in zip(np.diag(confusion).tolist(), images.tolist(), strict=True)
        ]
        scores["confusion"] = confusion.tolist()
    return scores


def _cross_entropy(log_probabilities: Logits, label: Labels) -> Float[Array, "batch"]:
    """NaN exactly where the logits are not numbers; any number where the label is below 0."""
    own = jnp.take_along_axis(log_probabilities, jnp.maximum(label, 0)[:, None], axis=-1)
    return -own[:, 0]


def _undecided(log_probabilities: Logits) -> Bool[Array, "batch"]:
    return jnp.isnan(log_probabilities).any(axis=-1)


def _rank(logits: Logits, label: Labels) -> Labels:
    """How many classes come before the label's."""
    own = jnp.take_along_axis(logits, jnp.maximum(label, 0)[:, None], axis=-1)
    lower = jnp.arange(logits.shape[-1])[None] < label[:, None]
    return ((logits > own) | ((logits == own) & lower)).sum(axis=-1)


def _calibration(
    log_probabilities: Logits, decided: Bool[Array, "batch"], right: Bool[Array, "batch"]
) -> dict[str, Num[Array, "bins"]]:
    """For each bin of the top-1 confidence: images, right ones, and the sum of confidences."""
    confidence = jnp.exp(log_probabilities.max(axis=-1))
    # Bin m of M is ((m - 1) / M, m / M].
    index = jnp.clip(jnp.ceil(confidence * BINS).astype(jnp.int32) - 1, 0, BINS - 1)
    inside = decided[:, None] & (index[:, None] == jnp.arange(BINS)[None])
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


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
