"""Whether self-distillation has collapsed: all images have the same features, or get the same answer."""

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
SAME_ANSWERS = 0.01  # what an answer tells of the image, over the logarithm of the outputs
_ONE = 0.05  # entropy over that logarithm, where one output is the answer
_ALL = 0.95  # where every output is
_CHUNK = 1024

_log = logging.getLogger(__name__)

# From a teacher's parameters and features (n, d) to probabilities (n, outputs).
Answer = Callable[[Any, Any], Float[Array, "n outputs"]]


def answer_entropies(
    answer: Answer, params: Any, features: Float[np.ndarray, "n d"]
) -> dict[str, float]:
    """`teacher_entropy`, the mean entropy of an image's answer, and `mean_entropy`, of the mean answer; in nats.

    Their difference is what an answer tells of the image. Each process computes all of it.

    Args:
      answer: a hashable function; it is compiled once.
    """
    count = len(features)
    padding = [(0, -count % _CHUNK), (0, 0)]
    chunks = np.pad(features, padding).reshape(-1, _CHUNK, features.shape[1])
    masks = (np.arange(chunks.shape[0] * _CHUNK) < count).reshape(-1, _CHUNK)
    sums = [
        jax.device_get(_sums(answer, params, rows, mask))
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
def _sums(answer: Answer, params: Any, features: Any, mask: Any) -> tuple[Array, Array]:
    probabilities = jnp.where(mask[:, None], answer(params, features), 0.0)
    return probabilities.sum(0), jax.scipy.special.entr(probabilities).sum()


def warn_of_same_answers(teacher_entropy: float, mean_entropy: float, outputs: int) -> None:
    """A sentence in the log where an answer tells nothing of the image, with what holds off that collapse."""
    largest = math.log(outputs)
    if not mean_entropy - teacher_entropy < SAME_ANSWERS * largest:
        return
    if mean_entropy < _ONE * largest:
        what = "one output, the same for every image"
        ways = [Way("lower {}, so that the centre follows", "config.dino.center_momentum")]
    elif teacher_entropy > _ALL * largest:
        what = "nearly all outputs, for every image"
        ways = [Way("lower {}", "config.dino.teacher_temp")]
    else:
        what = "the same distribution for every image"
        ways = [
            Way("let crops share more, by a larger {}", "config.dino.global_scale"),
            Way("change them less, by a lower {}", "config.augment.color_jitter"),
        ]
    _log.warning(
        "the teacher answers with %s (teacher_entropy %.3f, mean_entropy %.3f, largest %.3f): training has hardly "
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
