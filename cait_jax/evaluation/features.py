"""Outputs of a network for a split or for image files; what features tell of classes: k-NN and a linear probe."""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int, Int32

from cait_jax.augment.pipeline import normalise
from cait_jax.data.preprocess import Preprocessing
from cait_jax.data.split import Split
from cait_jax.errors import UserError
from cait_jax.evaluation.evaluate import Batch
from cait_jax.evaluation.scores import batches_of, show_progress
from cait_jax.models.inspect import forward_intermediates
from cait_jax.sharding import (
    batch_sharding,
    constrain_batch,
    make_mesh,
    padded_batch_size,
    put_batch,
    replicated,
)

FeatureFn = Callable[
    [Any, Mapping[str, Any], Float[Array, "batch height width channels"]], Float[Array, "batch d"]
]

_BANK_CHUNK = 16384  # training examples whose similarities are held at a time


def head_features(
    model: Any,
    variables: Mapping[str, Any],
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch d"]:
    """The input of the model's head."""
    features: Array = forward_intermediates(model, variables, images)[1]["features"]
    return features


def extract_features(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    feature_fn: FeatureFn = head_features,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, "n"]]:
    """Collects `feature_fn(model, variables, normalised images)` over batches of `cait_jax.data.eval_batches`.

    Args:
      model: as `feature_fn` takes it.
      variables: as `feature_fn` takes them.
      batches: their size is a multiple of the devices.
      mean: of each channel, on a scale from 0 to 1.
      std: of each channel, on the same scale.
      feature_fn: a pure function.
      mesh: default: all devices.
      progress: called after each batch with the number of this process's examples in it.

    Returns:
      Features and labels of all processes' examples in the order of the split, without padding, in every process.
    """
    mesh = make_mesh() if mesh is None else mesh
    step = jit_features(functools.partial(feature_fn, model), mean, std, mesh)
    variables = jax.device_put(variables, replicated(mesh))
    features, labels = collect_features(step, variables, batches, mesh, progress)
    return features, labels


def jit_features(
    function: Callable[[Any, Float[Array, "batch height width channels"]], Any],
    mean: tuple[float, ...],
    std: tuple[float, ...],
    mesh: Mesh,
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Jits `function(variables, normalised images)`, an array or a pytree of them, for `collect_features`.

    Variables keep the sharding that they have.
    """

    def step(variables: Any, batch: Batch) -> dict[str, Any]:
        found = function(variables, normalise(batch["image"], mean, std))
        features = jax.tree.map(lambda leaf: leaf.astype("float32"), found)
        return {"features": features, "label": batch["label"], "mask": batch["mask"]}

    return jax.jit(
        constrain_batch(step, mesh),
        in_shardings=(None, batch_sharding(mesh)),
        out_shardings=replicated(mesh),
    )


def collect_features(
    step: Callable[[Any, Batch], dict[str, Any]],
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    mesh: Mesh,
    progress: Callable[[int], object] | None = None,
) -> tuple[Any, Int32[np.ndarray, "n"]]:
    """What a function of `jit_features` gives for batches, as `extract_features` returns it."""
    rows = batch_sharding(mesh)
    features, labels = [], []

    def collect(output: dict[str, Any]) -> None:
        mask = np.asarray(output["mask"])
        features.append(jax.tree.map(lambda leaf: np.asarray(leaf)[mask], output["features"]))
        labels.append(np.asarray(output["label"])[mask])

    pending = None
    for batch in batches:
        output = step(variables, put_batch(batch, rows))
        if pending is not None:
            collect(pending)
        pending = output
        if progress is not None:
            progress(int(batch["mask"].sum()))
    if pending is None:
        raise ValueError("there is no batch to take features of")
    collect(pending)
    whole = jax.tree.map(lambda *parts: np.concatenate(parts), *features)
    return whole, np.concatenate(labels)


def features_of_split(
    model: Any,
    variables: Mapping[str, Any],
    split: Split,
    preprocessing: Preprocessing,
    *,
    title: str,
    feature_fn: FeatureFn = head_features,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, "n"]]:
    """`extract_features` of every image of a split, over all devices, with a progress bar or lines.

    The split must have the channels of the preprocessing, see `cait_jax.evaluation.scores.with_channels`; the
    global `batch_size` is rounded up to a multiple of the devices.
    """
    with (
        batches_of(split, preprocessing, batch_size, workers, make_mesh()) as batches,
        show_progress(len(split), title) as update,
    ):
        return extract_features(
            model,
            variables,
            batches,
            mean=preprocessing.mean,
            std=preprocessing.std,
            feature_fn=feature_fn,
            progress=update,
        )


@dataclasses.dataclass(frozen=True)
class Answers:
    """The outputs of a batch of image files.

    Attributes:
      paths: the decoded files, in order.
      outputs: a pytree of arrays whose first axis is that of `paths`; None without paths.
      broken: the files that could not be decoded, each with the reason.
    """

    paths: list[Path]
    outputs: Any
    broken: list[tuple[Path, str]]


def run_over_photographs(
    function: Callable[[Any, Any], Any],
    variables: Mapping[str, Any],
    preprocessing: Preprocessing,
    paths: Sequence[Path],
    *,
    batch_size: int = 32,
    mesh: Mesh | None = None,
) -> Iterator[Answers]:
    """Applies a function to image files in order, in batches.

    Threads decode a batch while the one before it is computed; no more is held in memory. `function`, of variables
    and normalised images (batch, height, width, channels), is pure and gives a pytree of arrays whose first axis
    is the batch. The global `batch_size` is rounded up to a multiple of the devices of `mesh` (default: all).
    """
    mesh = make_mesh() if mesh is None else mesh
    whole, rows = replicated(mesh), batch_sharding(mesh)
    batch_size = padded_batch_size(min(batch_size, len(paths)), mesh)

    def step(variables: Any, images: Any) -> Any:
        return function(variables, normalise(images, preprocessing.mean, preprocessing.std))

    step = jax.jit(constrain_batch(step, mesh), in_shardings=(whole, rows), out_shardings=whole)
    variables = jax.device_put(variables, whole)
    chunks = [paths[i : i + batch_size] for i in range(0, len(paths), batch_size)]

    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def submit(chunk: Sequence[Path]) -> list[Future[Any]]:
            return [pool.submit(_decode, preprocessing, path) for path in chunk]

        ahead = submit(chunks[0]) if chunks else []
        for number, chunk in enumerate(chunks):
            decoded = [future.result() for future in ahead]
            ahead = submit(chunks[number + 1]) if number + 1 < len(chunks) else []
            good = [i for i, crop in enumerate(decoded) if isinstance(crop, np.ndarray)]
            broken = [(path, crop) for path, crop in zip(chunk, decoded, strict=True)
                      if isinstance(crop, str)]  # fmt: skip
            outputs = None
            if good:
                shape = (batch_size, *preprocessing.image_size, preprocessing.channels)
                images = np.zeros(shape, np.uint8)
                images[: len(good)] = [decoded[i] for i in good]
                batch = put_batch({"image": images}, rows)
                outputs = jax.tree.map(
                    lambda array: np.asarray(array)[: len(good)],  # noqa: B023
                    step(variables, batch["image"]),
                )
            yield Answers([chunk[i] for i in good], outputs, broken)


def _decode(preprocessing: Preprocessing, path: Path) -> np.ndarray | str:
    """The crop, or why there is none."""
    try:
        return preprocessing.crop(path)
    except UserError as error:
        return str(error)


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
    """Accuracy, 0 to 1, of `knn_predict`."""
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
    """Weighted k-nearest-neighbour classification (Wu et al. 2018, arXiv 1805.01978, section 3.4).

    The `k` training examples of greatest cosine similarity s vote with weight `exp(s / temperature)`. The search
    is exact, in float32. Where similarities or votes tie, the lower index or label wins. `batch_size`, test
    examples at a time over `devices` (default: this process's), does not change the result.
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
    # The k nearest are merged chunk by chunk, so a chunk must hold k.
    chunk = max(k, min(_BANK_CHUNK, len(train_features)))
    chunks = -(-len(train_features) // chunk)
    bank = _pad(_normalise_rows(train_features), chunks * chunk).reshape(chunks, chunk, -1)
    labels = _pad(train_labels.astype(np.int32), chunks * chunk, -1).reshape(chunks, chunk)
    whole, rows = replicated(mesh), batch_sharding(mesh)
    classify = jax.jit(
        functools.partial(
            _classify, k=k, temperature=temperature, num_classes=int(train_labels.max()) + 1
        ),
        in_shardings=(whole, whole, rows),
        out_shardings=whole,
    )
    bank, labels = jax.device_put((bank, labels), whole)
    queries = _normalise_rows(test_features)
    parts = (
        jax.device_put(_pad(queries[start : start + size], size), rows)
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
    def merge(best: tuple[Array, Array], part: tuple[Array, Array]) -> Any:
        vectors, classes = part
        similarity = jnp.matmul(queries, vectors.T, precision="highest")
        similarity = jnp.where(classes[None] < 0, -jnp.inf, similarity)
        # Those found so far have the lower indices, so they come first: top_k is stable.
        similarity = jnp.concatenate([best[0], similarity], axis=1)
        candidates = jnp.broadcast_to(classes[None], (len(queries), len(classes)))
        candidates = jnp.concatenate([best[1], candidates], axis=1)
        top, places = jax.lax.top_k(similarity, k)
        return (top, jnp.take_along_axis(candidates, places, axis=1)), None

    none = (
        jnp.full((len(queries), k), -jnp.inf, jnp.float32),
        jnp.full((len(queries), k), -1, jnp.int32),
    )
    (similarity, classes), _ = jax.lax.scan(merge, none, (bank, labels))
    # Relative to the nearest, so that no temperature overflows.
    weights = jnp.exp((similarity - similarity[:, :1]) / temperature)
    votes = jax.nn.one_hot(classes, num_classes)
    total = jnp.einsum("bk,bkc->bc", weights, votes, precision="highest")
    return jnp.argmax(total, axis=-1).astype(jnp.int32)


def _normalise_rows(features: np.ndarray) -> np.ndarray:
    features = np.asarray(features, np.float32)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    unit: np.ndarray = features / np.maximum(norms, np.finfo(np.float32).tiny)
    return unit


def _pad(rows: np.ndarray, count: int, value: int = 0) -> np.ndarray:
    missing = [(0, count - len(rows)), *[(0, 0)] * (rows.ndim - 1)]
    return np.pad(rows, missing, constant_values=value)


def linear_probe(inverse_l2: float, max_iterations: int) -> Any:
    """scikit-learn's pipeline of `StandardScaler` and `LogisticRegression` with `C=inverse_l2`, not yet fitted."""
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UserError(
            'linear heads are fitted by scikit-learn: pip install "cait-jax[probe]"'
        ) from error
    return make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_l2, max_iter=max_iterations)
    )


def probe_accuracy(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, "m"],
    *,
    inverse_l2: float = 1.0,
    max_iterations: int = 1000,
) -> float:
    """Accuracy, 0 to 1, of a linear probe: multinomial logistic regression on standardised features.

    Features are scaled to mean 0 and variance 1 over the training examples. The fit is scikit-learn's
    `LogisticRegression` (L-BFGS, `C=inverse_l2`), which warns where it has not converged.
    """
    probe = linear_probe(inverse_l2, max_iterations)
    if len(np.unique(train_labels)) < 2:
        raise UserError(
            "a linear probe tells classes apart, and the training examples have only one; choose a "
            "split with more"
        )
    probe.fit(train_features, train_labels)
    return float(probe.score(test_features, test_labels))
