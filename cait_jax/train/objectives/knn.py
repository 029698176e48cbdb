"""What a backbone has learnt without labels: k-NN accuracy of its features during training, and their spread."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float
from ml_collections import ConfigDict

from cait_jax.data.loader import Batches, eval_batches
from cait_jax.data.split import Split
from cait_jax.evaluation.features import collect_features, jit_features, knn_accuracy
from cait_jax.sharding import padded_batch_size
from cait_jax.train.step import Evaluate

NEIGHBOURS = 20
_COLLAPSED = 0.01  # `feature_std`

_log = logging.getLogger(__name__)


def from_config(config: ConfigDict, split: Split, model: Any) -> Callable[[Mesh], Evaluate]:
    """From a mesh to the evaluator of a headless network, whose neighbours are the images of a training split."""

    def bank(batch_size: int) -> Batches:
        return eval_batches(
            split,
            batch_size=batch_size,
            image_size=model.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            crop_pct=config.eval.crop_pct,
        )

    return functools.partial(
        make_evaluator,
        model,
        bank,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        batch_size=config.eval.batch_size,
    )


def make_evaluator(
    model: Any,
    bank: Callable[[int], Batches],
    mesh: Mesh,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    batch_size: int,
) -> Evaluate:
    """An evaluator of features, which every device of every process computes a part of.

    Its parameters are those of `model`, which gives features. Metrics: `knn_accuracy` (0 to 1) by
    `cait_jax.evaluation.features.knn_predict` with 20 neighbours among the images of `bank`, where both have
    labels; `feature_rank` and `feature_std`. Features that are not finite make all of them NaN. The log says where
    all images have nearly the same features.

    Args:
      bank: from a batch size to the batches of the training split, each image once.
      batch_size: of the bank, rounded up to a multiple of the devices.
    """

    def features(params: Any, images: Any) -> Any:
        return {name: model.apply({"params": each}, images) for name, each in params.items()}

    step = jit_features(features, mean, std, mesh)

    def run(params: Any, batches: Any, progress: Any = None) -> dict[str, dict[str, float]]:
        found, labels = collect_features(step, params, batches, mesh, progress)
        alive = getattr(batches, "before_each", lambda: None)
        with bank(padded_batch_size(batch_size, mesh)) as known:
            bank_found, bank_labels = collect_features(
                step, params, known, mesh, lambda images: alive()
            )
        return {
            name: _metrics(found[name], labels, bank_found[name], bank_labels) for name in params
        }

    return run


def _metrics(
    features: np.ndarray, labels: np.ndarray, bank: np.ndarray, bank_labels: np.ndarray
) -> dict[str, float]:
    labelled, known = labels >= 0, bank_labels >= 0
    scored = bool(labelled.any() and known.any())
    names = ["knn_accuracy"] * scored + ["feature_rank", "feature_std"]
    if not (np.isfinite(features).all() and np.isfinite(bank).all()):
        return dict.fromkeys(names, float("nan"))
    found = {}
    if scored:
        found["knn_accuracy"] = knn_accuracy(
            bank[known],
            bank_labels[known],
            features[labelled],
            labels[labelled],
            k=min(NEIGHBOURS, int(known.sum())),
        )
    rank, spread = feature_rank(features), feature_std(features)
    if spread < _COLLAPSED:
        _log.warning(
            "%d images have nearly the same features (feature_std %.4f, feature_rank %.2f): training has hardly "
            "begun, or has collapsed; in the second case change the temperatures or the learning rate",
            len(features),
            spread,
            rank,
        )
    return found | {"feature_rank": rank, "feature_std": spread}


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


def _directions(features: np.ndarray) -> np.ndarray:
    x = np.asarray(features, np.float64)
    unit: np.ndarray = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return unit
