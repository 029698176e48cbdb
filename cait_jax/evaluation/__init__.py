"""What a model is worth: exact scores of any checkpoint on any data set."""

from cait_jax.evaluation.benchmarks import Benchmark, find_benchmark
from cait_jax.evaluation.confusion import save_confusion
from cait_jax.evaluation.features import extract_features
from cait_jax.evaluation.knn import knn_accuracy, knn_predict
from cait_jax.evaluation.probe import probe_accuracy
from cait_jax.evaluation.score import Scores, score

__all__ = [
    "Benchmark",
    "Scores",
    "extract_features",
    "find_benchmark",
    "knn_accuracy",
    "knn_predict",
    "probe_accuracy",
    "save_confusion",
    "score",
]
