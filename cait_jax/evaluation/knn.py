"""Weighted k-nearest-neighbour classification of features (Wu et al. 2018, arXiv 1805.01978, section 3.4)."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int32

from cait_jax.errors import UserError
from cait_jax.sharding import batch_sharding, make_mesh, padded_batch_size, replicated

_BANK_CHUNK = 16384


def knn_accuracy(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, "m"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    devices: list[jax.Device] | None = None,
) -> float:
    """The share of test examples that `knn_predict` gives their own label.

    Args:
      train_features: as for `knn_predict`.
      train_labels: as for `knn_predict`.
      test_features: as for `knn_predict`.
      test_labels: what is right.
      k: as for `knn_predict`.
      temperature: as for `knn_predict`.
      batch_size: as for `knn_predict`.
      devices: as for `knn_predict`.

    Raises:
      UserError: as of `knn_predict`.
    """
    predicted = knn_predict(
        train_features,
        train_labels,
        test_features,
        k=k,
        temperature=temperature,
        batch_size=batch_size,
        devices=devices,
    )
    return float(np.mean(predicted == test_labels))


def knn_predict(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test_features: Float[np.ndarray, "m d"],
    *,
    k: int = 20,
    temperature: float = 0.07,
    batch_size: int = 256,
    devices: list[jax.Device] | None = None,
) -> Int32[np.ndarray, "m"]:
    """Classifies by the `k` training examples of greatest cosine similarity s, each voting `exp(s / temperature)`.

    The search is exact, in float32. Where similarities or votes tie, the lower index or label wins.

    Args:
      train_features: one vector an example.
      train_labels: classes, counted from 0.
      test_features: what to classify.
      k: neighbours that vote.
      temperature: the lower, the more the nearest decide.
      batch_size: test examples at a time over all devices; it changes memory, not the result.
      devices: this process's devices if not given.

    Returns:
      The class of each test example.

    Raises:
      UserError: `k` is not between 1 and the number of training examples, or there is nothing to classify.
    """
    if not 1 <= k <= len(train_features):
        raise UserError(
            f"k is {k}, but there are {len(train_features)} training examples; choose k from 1 to "
            f"{len(train_features)}"
        )
    if not len(test_features):
        raise UserError("there are no test examples to classify; choose another split")

    mesh = make_mesh(jax.local_devices() if devices is None else devices)
    size = padded_batch_size(batch_size, mesh)
    # Neighbours come chunk by chunk, so a chunk must hold k.
    chunk = max(k, min(_BANK_CHUNK, len(train_features)))
    chunks = -(-len(train_features) // chunk)
    bank = _padded(_unit(train_features), chunks * chunk).reshape(chunks, chunk, -1)
    labels = _padded(train_labels.astype(np.int32), chunks * chunk, -1).reshape(chunks, chunk)
    whole, rows = replicated(mesh), batch_sharding(mesh)
    classify = jax.jit(
        functools.partial(
            _classify, k=k, temperature=temperature, num_classes=int(train_labels.max()) + 1
        ),
        in_shardings=(whole, whole, rows),
        out_shardings=whole,
    )
    bank, labels = jax.device_put((bank, labels), whole)
    queries = _unit(test_features)
    parts = (
        jax.device_put(_padded(queries[start : start + size], size), rows)
        for start in range(0, len(queries), size)
    )
    predicted = [np.asarray(classify(bank, labels, part)) for part in parts]
    return np.concatenate(predicted)[: len(queries)]


def _classify(
    bank: Float[Array, "chunks chunk d"],
    labels: Int[Array, "chunks chunk"],
    queries: Float[Array, "batch d"],
    *,
    k: int,
    temperature: float,
    num_classes: int,
) -> Int[Array, "batch"]:
    def nearer(found: Any, part: Any) -> tuple[Any, None]:
        vectors, classes = part
        similarity = jnp.matmul(queries, vectors.T, precision="highest")
        similarity = jnp.where(classes[None] < 0, -jnp.inf, similarity)
        # Those found so far have the lower indices, so they come first: top_k is stable.
        similarity = jnp.concatenate([found[0], similarity], axis=1)
        candidates = jnp.broadcast_to(classes[None], (len(queries), len(classes)))
        candidates = jnp.concatenate([found[1], candidates], axis=1)
        best, places = jax.lax.top_k(similarity, k)
        return (best, jnp.take_along_axis(candidates, places, axis=1)), None

    nobody = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), -1, jnp.int32),
    )
    (similarity, classes), _ = jax.lax.scan(nearer, nobody, (bank, labels))
    # Relative to the nearest, so that no temperature overflows.
    votes = jnp.exp((similarity - similarity[:, :1]) / temperature)
    ballots = jax.nn.one_hot(classes, num_classes)
    total = jnp.einsum("bk,bkc->bc", votes, ballots, precision="highest")
    return jnp.argmax(total, axis=-1).astype(jnp.int32)


def _unit(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return features / np.maximum(norms, np.finfo(np.float32).tiny)


def _padded(rows: np.ndarray, count: int, value: int = 0) -> np.ndarray:
    missing = [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, missing, constant_values=value)
