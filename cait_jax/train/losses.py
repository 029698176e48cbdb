"""Losses, one number an example, in nats."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from cait_jax.errors import UserError, nearest, setting

Logits = Float[Array, "batch classes"]
Targets = Float[Array, "batch classes"]
Labels = Int[Array, "batch"]

LABEL_LOSSES = ("softmax", "binary")
TEACHER_LOSSES = ("none", "hard", "soft")


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, "batch"]:
    """Softmax cross-entropy against distributions over classes, such as smoothed or mixed labels.

    Args:
      logits: unnormalised log probabilities.
      targets: what share of an example each class has; rows sum to 1.

    Returns:
      The loss of each example, in nats.
    """
    return optax.softmax_cross_entropy(logits, targets)


def binary_cross_entropy(
    logits: Logits,
    targets: Targets,
    threshold: float | None = None,
    sum_classes: bool = False,
) -> Float[Array, "batch"]:
    """Each class as a yes or no of its own (Wightman et al., arXiv 2110.00476).

    Args:
      logits: log odds of each class.
      targets: from 0 to 1, of `cait_jax.augment.mixup.soft_labels` or mixed; rows need not sum to 1.
      threshold: targets above it become 1 and all others 0, so that each image mixed in counts fully.
      sum_classes: sum over classes instead of averaging.

    Returns:
      The loss of each example, in nats; a mean over classes, as timm's `BinaryCrossEntropy` has it.
    """
    if threshold is not None:
        targets = (targets > threshold).astype(logits.dtype)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)
    return losses.sum(axis=-1) if sum_classes else losses.mean(axis=-1)


def hard_distillation(
    label_loss: Float[Array, "batch"],
    logits: Logits,
    teacher_logits: Logits,
    weight: float = 0.5,
) -> Float[Array, "batch"]:
    """Learns the label and the class the teacher would choose (Touvron et al., arXiv 2012.12877, eq. 3).

    DeiT has two heads: `label_loss` is of the class head's output, `logits` are the distillation head's
    (section 4). CaiT has one, and both are of its output. That is an assumption: no public code of CaiT's
    distillation was found, and DeiT's raises for a network with a single output.

    Args:
      label_loss: the loss against the label, of any kind.
      logits: the student's, to agree with the teacher.
      teacher_logits: the teacher's; only the largest counts.
      weight: of the teacher's part.

    Returns:
      `(1 - weight) * label_loss + weight * CE(logits, argmax teacher_logits)` of each example.
    """
    chosen = jnp.argmax(teacher_logits, axis=-1)
    of_teacher = optax.softmax_cross_entropy_with_integer_labels(logits, chosen)
    return (1 - weight) * label_loss + weight * of_teacher


def soft_distillation(
    label_loss: Float[Array, "batch"],
    logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
    weight: float = 0.5,
) -> Float[Array, "batch"]:
    """Learns the label and the teacher's distribution (Hinton et al.; Touvron et al., arXiv 2012.12877, eq. 2).

    The defaults, temperature 1 and weight 0.5, are those of DeiT's published code; its paper has 3 and 0.1.
    The divergence is a sum over classes, as in the equation; the code divides it by the number of classes as
    well (facebookresearch/deit, `losses.py`).

    Args:
      label_loss: the loss against the label, of any kind.
      logits: the student's, of the head that learns from the teacher.
      teacher_logits: the teacher's; no gradient flows there.
      temperature: tau, which both are divided by; above 1 it shows what the teacher thinks of other classes.
      weight: lambda.

    Returns:
      `(1 - lambda) * label_loss + lambda * tau^2 * KL(teacher || student)` of each example.
    """
    student = jax.nn.log_softmax(logits / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
    return (1 - weight) * label_loss + weight * temperature**2 * divergence


def correct(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    """1 where the largest logit is the label's, else 0."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)


def label_loss(name: str, *, threshold: float | None = None) -> Callable[..., Array]:
    """The loss against labels by its name in a config.

    Args:
      name: `"softmax"` for `cross_entropy`, or `"binary"`.
      threshold: of `binary_cross_entropy`.

    Raises:
      UserError: for an unknown name, or a threshold without `"binary"`.
    """
    if name == "binary":
        return functools.partial(binary_cross_entropy, threshold=threshold)
    if name != "softmax":
        raise UserError(
            f"there is no {setting('config.loss.name')} {name!r}; {nearest(name, LABEL_LOSSES)}"
        )
    if threshold is not None:
        raise UserError(
            f"{setting('config.loss.target_threshold')} goes with {setting('config.loss.name', 'binary')}, "
            "not softmax"
        )
    return cross_entropy


def teacher_loss(kind: str, *, weight: float, temperature: float) -> Callable[..., Array] | None:
    """How a student learns from its teacher, by its name in a config.

    Args:
      kind: `"hard"`, `"soft"`, or `"none"` without a teacher.
      weight: the teacher's part of the loss.
      temperature: of soft distillation.

    Raises:
      UserError: for an unknown name.
    """
    kinds = {
        "none": None,
        "hard": functools.partial(hard_distillation, weight=weight),
        "soft": functools.partial(soft_distillation, temperature=temperature, weight=weight),
    }
    if kind not in kinds:
        raise UserError(
            f"there is no {setting('config.distill.kind')} {kind!r}; {nearest(kind, kinds)}"
        )
    return kinds[kind]
