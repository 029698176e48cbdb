"""Exact scores of a model on any data set, and k-NN and linear probes of its features."""

from cait_jax.evaluation.features import (
    extract_features,
    knn_accuracy,
    knn_predict,
    probe_accuracy,
)
from cait_jax.evaluation.scores import Benchmark, Scores, find_benchmark, score

__all__ = [
    "Benchmark",
    "Scores",
    "extract_features",
    "find_benchmark",
    "knn_accuracy",
    "knn_predict",
    "probe_accuracy",
    "score",
]
