"""Features of every image of a split."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Float32, Int32

from cait_jax.augment.pipeline import normalise
from cait_jax.data.pipeline import eval_batches
from cait_jax.data.preprocess import Preprocessing
from cait_jax.data.sources import Split
from cait_jax.evaluation.metrics import Batch
from cait_jax.evaluation.progress import show_progress
from cait_jax.models.intermediates import forward_intermediates
from cait_jax.sharding import (
    batch_sharding,
    constrain_batch,
    make_mesh,
    padded_batch_size,
    put_batch,
    replicated,
)

FeaturesOf = Callable[
    [Any, Mapping[str, Any], Float[Array, "batch height width channels"]], Float[Array, "batch d"]
]


def head_features(
    model: Any,
    variables: Mapping[str, Any],
    images: Float[Array, "batch height width channels"],
) -> Float[Array, "batch d"]:
    """What the model's head reads."""
    return forward_intermediates(model, variables, images)[1]["features"]


def extract_features(
    model: Any,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    features_of: FeaturesOf = head_features,
    mesh: Mesh | None = None,
    progress: Callable[[int], object] | None = None,
) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, "n"]]:
    """Runs a model over a split and collects one vector an image.

    Args:
      model: the first argument of `features_of`.
      variables: the second.
      batches: of `cait_jax.data.eval_batches`; their size divides by the number of devices.
      mean: of each channel, on a scale from 0 to 1.
      std: likewise.
      features_of: a pure function of model, variables and normalised float images, giving (batch, d).
      mesh: the devices that share each batch; all of them if not given.
      progress: called after each batch with the number of this process's examples in it.

    Returns:
      Features, float32 (n, d), and labels, int32 (n,), of all processes' examples in the order of the split,
      without padding, in every process.
    """
    mesh = make_mesh() if mesh is None else mesh
    whole, rows = replicated(mesh), batch_sharding(mesh)

    def step(variables: Any, batch: Batch) -> dict[str, Array]:
        images = normalise(batch["image"], mean, std)
        features = features_of(model, variables, images).astype("float32")
        return {"features": features, "label": batch["label"], "mask": batch["mask"]}

    step = jax.jit(constrain_batch(step, mesh), in_shardings=(whole, rows), out_shardings=whole)
    variables = jax.device_put(variables, whole)
    features, labels = [], []

    def collect(output: dict[str, Array]) -> None:
        mask = np.asarray(output["mask"])
        features.append(np.asarray(output["features"])[mask])
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
    return np.concatenate(features), np.concatenate(labels)


def features_of_split(
    model: Any,
    variables: Mapping[str, Any],
    split: Split,
    preprocessing: Preprocessing,
    *,
    title: str,
    features_of: FeaturesOf = head_features,
    batch_size: int = 64,
    workers: int = 0,
) -> tuple[Float32[np.ndarray, "n d"], Int32[np.ndarray, "n"]]:
    """`extract_features` of every image of a split, with a bar or lines.

    Args:
      model: as for `extract_features`.
      variables: of the model.
      split: of `cait_jax.data.load_split`, with the channels of the preprocessing.
      preprocessing: size, crop and normalisation of the images.
      title: of the bar.
      features_of: as for `extract_features`.
      batch_size: images at a time over all devices, rounded up to a multiple of their number.
      workers: processes that decode; with 0 threads of this one do.
    """
    with (
        eval_batches(
            split,
            batch_size=padded_batch_size(batch_size, make_mesh()),
            image_size=preprocessing.image_size,
            workers=workers,
            crop_ratio=preprocessing.crop_ratio,
        ) as batches,
        show_progress(len(split), title) as update,
    ):
        return extract_features(
            model,
            variables,
            batches,
            mean=preprocessing.mean,
            std=preprocessing.std,
            features_of=features_of,
            progress=update,
        )
