"""Collapse of self-distillation: features or teacher outputs that do not depend on the image."""

import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from scipy.special import entr

from cait_jax.errors import Way, advise

SAME_FEATURES = 0.01  # `feature_std`
LEAST_INFORMATION = (
    0.01  # of the output about the image, over the logarithm of the number of outputs
)
_PEAKED = 0.05  # entropy over that logarithm of a distribution on one output
_UNIFORM = 0.95  # of one that is uniform
_CHUNK = 1024

_log = logging.getLogger(__name__)

# From a teacher's parameters and features (n, d) to probabilities (n, outputs).
Distribution = Callable[[Any, Any], Float[Array, "n outputs"]]


def output_entropies(
    distribution: Distribution, params: Any, features: Float[np.ndarray, "n d"]
) -> dict[str, float]:
    """`teacher_entropy`, the mean entropy of an image's output, and `mean_entropy`, of the mean output; in nats.

    Their difference is the mutual information of image and output. Each process computes all of it.

    Args:
      distribution: a hashable function; it is compiled once.
    """
    count = len(features)
    padding = [(0, -count % _CHUNK), (0, 0)]
    chunks = np.pad(features, padding).reshape(-1, _CHUNK, features.shape[1])
    masks = (np.arange(chunks.shape[0] * _CHUNK) < count).reshape(-1, _CHUNK)
    sums = [
        jax.device_get(_sums(distribution, params, rows, mask))
        for rows, mask in zip(chunks, masks, strict=True)
    ]
    probabilities, entropies = (
        np.sum(part, axis=0, dtype=np.float64) for part in zip(*sums, strict=True)
    )
    return {
        "teacher_entropy": float(entropies / count),
        "mean_entropy": float(entr(probabilities / count).sum()),
    }


@functools.partial(jax.jit, static_argnums=0)
def _sums(distribution: Distribution, params: Any, features: Any, mask: Any) -> tuple[Array, Array]:
    probabilities = jnp.where(mask[:, None], distribution(params, features), 0.0)
    return probabilities.sum(0), jax.scipy.special.entr(probabilities).sum()


def warn_of_same_outputs(teacher_entropy: float, mean_entropy: float, outputs: int) -> None:
    """Warns where the output has no information about the image, with what prevents that kind of collapse."""
    largest = math.log(outputs)
    if not mean_entropy - teacher_entropy < LEAST_INFORMATION * largest:
        return
    if mean_entropy < _PEAKED * largest:
        what = "peaked at one dimension, the same for every image"
        ways = [Way("lower {}, so that the centre follows", "config.dino.center_momentum")]
    elif teacher_entropy > _UNIFORM * largest:
        what = "nearly uniform for every image"
        ways = [Way("lower {}", "config.dino.teacher_temp")]
    else:
        what = "the same for every image"
        ways = [
            Way("let crops overlap more, by a larger {}", "config.dino.global_scale"),
            Way("change them less, by a lower {}", "config.augment.color_jitter"),
        ]
    _log.warning(
        "the teacher's output is %s (teacher_entropy %.3f, mean_entropy %.3f, largest %.3f): training has hardly "
        "begun, or has collapsed; in the second case %s",
        what, teacher_entropy, mean_entropy, largest, advise(*ways),
    )  # fmt: skip


def feature_rank(features: Float[np.ndarray, "n d"]) -> float:
    """The effective rank of directions, from 1 to d: exp of the entropy of the singular values over their sum.

    RankMe (Garrido et al., arXiv 2210.02885, equation 1), of rows scaled to length 1.
    """
    x = _directions(features)
    values = np.sqrt(np.maximum(np.linalg.eigvalsh(x.T @ x), 0.0))
    shares = values[values > 0] / values.sum()
    return float(np.exp(-(shares * np.log(shares)).sum()))


def feature_std(features: Float[np.ndarray, "n d"]) -> float:
    """The root of the summed variances of directions: 0 where all are one, 1 where their mean is 0."""
    return float(np.sqrt(_directions(features).var(0).sum()))


def warn_of_same_features(count: int, std: float, rank: float) -> None:
    """A sentence in the log where all images have nearly the same features."""
    if std < SAME_FEATURES:
        _log.warning(
            "%d images have nearly the same features (feature_std %.4f, feature_rank %.2f): training has hardly "
            "begun, or has collapsed; in the second case change the temperatures or the learning rate",
            count, std, rank,
        )  # fmt: skip


def _directions(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float64)
    unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit
