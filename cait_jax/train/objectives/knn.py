"""What a backbone has learnt without labels, during training: k-NN accuracy of its features, and their spread."""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int
from ml_collections import ConfigDict

from cait_jax.data.loader import Batches, eval_batches
from cait_jax.data.split import Split
from cait_jax.evaluation.features import collect_features, jit_features, knn_accuracy
from cait_jax.sharding import padded_batch_size
from cait_jax.train.objectives import collapse
from cait_jax.train.step import Evaluate

NEIGHBOURS = 20
# From parameters and images (n, h, w, channels) to features (n, d).
Features = Callable[[Any, Any], Any]
# From parameters and features to further metrics.
Judge = Callable[[Any, np.ndarray], dict[str, float]]


@dataclasses.dataclass(frozen=True)
class Bank:
    """The images of a training split, each once: those among which neighbours are found.

    Attributes:
      batches: of a batch size.
      batch_size: rounded up to a multiple of the devices.
      mean: of each channel, as `std` on a scale from 0 to 1.
    """

    batches: Callable[[int], Batches]
    batch_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def collect(
        self, step: Callable[..., Any], params: Any, mesh: Mesh, alive: Callable[[], object]
    ) -> tuple[Any, np.ndarray]:
        """What a function of `jit_features` gives, and labels; `alive` is called after each batch."""
        with self.batches(padded_batch_size(self.batch_size, mesh)) as batches:
            return collect_features(step, params, batches, mesh, lambda images: alive())


def bank_from_config(config: ConfigDict, split: Split, model: Any) -> Bank:
    """The images of a split as `config.eval` has them."""
    batches = functools.partial(
        eval_batches,
        split,
        image_size=model.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=config.data.workers,
        crop_pct=config.eval.crop_pct,
    )
    return Bank(
        lambda size: batches(batch_size=size),
        config.eval.batch_size,
        tuple(config.data.mean),
        tuple(config.data.std),
    )


def make_evaluator(
    features: Features, bank: Bank, mesh: Mesh, judge: Judge = lambda params, features: {}
) -> Evaluate:
    """An evaluator of features, which every device of every process computes a part of.

    Metrics: those of `feature_metrics`, and what `judge` gives; all NaN where features are not finite.
    """

    def of_all(params: Any, images: Any) -> Any:
        return {name: features(each, images) for name, each in params.items()}

    step = jit_features(of_all, bank.mean, bank.std, mesh)

    def run(params: Any, batches: Any, progress: Any = None) -> dict[str, dict[str, float]]:
        found, labels = collect_features(step, params, batches, mesh, progress)
        alive = getattr(batches, "before_each", lambda: None)
        known, known_labels = bank.collect(step, params, mesh, alive)
        metrics = {}
        for name, each in params.items():
            measured = feature_metrics(found[name], labels, known[name], known_labels)
            judged = judge(each, found[name])
            if not all(map(math.isfinite, measured.values())):
                judged = dict.fromkeys(judged, math.nan)
            metrics[name] = measured | judged
        return metrics

    return run


def feature_metrics(
    features: Float[np.ndarray, "n d"],
    labels: Int[np.ndarray, "n"],
    bank: Float[np.ndarray, "m d"],
    bank_labels: Int[np.ndarray, "m"],
) -> dict[str, float]:
    """`knn_accuracy` (0 to 1) where both have labels (0 or more), `feature_rank` and `feature_std`.

    By `cait_jax.evaluation.features.knn_predict` with 20 neighbours; NaN where features are not finite. The log
    says where all images have nearly the same features.
    """
    labelled, known = labels >= 0, bank_labels >= 0
    scored = bool(labelled.any() and known.any())
    if not (np.isfinite(features).all() and np.isfinite(bank).all()):
        names = [*["knn_accuracy"] * scored, "feature_rank", "feature_std"]
        return dict.fromkeys(names, math.nan)
    found = {}
    if scored:
        found["knn_accuracy"] = knn_accuracy(
            bank[known],
            bank_labels[known],
            features[labelled],
            labels[labelled],
            k=min(NEIGHBOURS, int(known.sum())),
        )
    rank, std = collapse.feature_rank(features), collapse.feature_std(features)
    collapse.warn_of_same_features(len(features), std, rank)
    return found | {"feature_rank": rank, "feature_std": std}
