"""Batched inference over image files; those that cannot be decoded are reported."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from cait_jax.augment.pipeline import normalise
from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError
from cait_jax.sharding import (
    batch_sharding,
    constrain_batch,
    make_mesh,
    padded_batch_size,
    put_batch,
    replicated,
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
