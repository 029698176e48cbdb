"""Losses, one number an example."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

Logits = Float[Array, "batch classes"]
Labels = Int[Array, "batch"]


def cross_entropy(
    logits: Logits, labels: Labels, label_smoothing: float = 0.0
) -> Float[Array, "batch"]:
    """Softmax cross-entropy against smoothed labels (Szegedy et al., arXiv 1512.00567, section 7).

    Args:
      logits: unnormalised log probabilities.
      labels: class indices.
      label_smoothing: the share of a label spread evenly over all classes, its own included.

    Returns:
      The loss of each example, in nats.
    """
    plain = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    if label_smoothing == 0.0:
        return plain
    uniform = optax.softmax_cross_entropy(logits, jnp.full_like(logits, 1 / logits.shape[-1]))
    return (1 - label_smoothing) * plain + label_smoothing * uniform


def correct(logits: Logits, labels: Labels) -> Float[Array, "batch"]:
    """1 where the largest logit is the label's, else 0."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
