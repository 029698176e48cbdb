"""Pictures of what masked autoencoding draws, in WORKDIR/reconstructions/step_N.png."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from cait_jax.augment.pipeline import normalise
from cait_jax.data.loader import eval_batches
from cait_jax.errors import StorageError
from cait_jax.files import atomic_replace
from cait_jax.sharding import replicated
from cait_jax.train.objectives.patches import patch_statistics, patchify, ranks, unpatchify
from cait_jax.train.step import Params, Record

IMAGES = 8
"""The first of the evaluation split, with the masks that evaluation gives them."""
_GREY = 0.5  # of masked patches
_SIDE = 96  # pixels that the shorter side of an image has at least
_GAP = 4  # pixels between images


def picture_recorder(objective: Any, trainer: Any, workdir: Path) -> Record:
    """A function of a step and its parameters that draws images, their visible part, and what a `Mae` makes of it.

    A picture depends on the step alone: a resumed run writes the same again. What was visible is kept in a
    reconstruction; a patch that is predicted without mean and deviation is drawn with its own.

    Raises:
      StorageError: by the function: a picture cannot be written.
    """
    images = _first_images(trainer)
    draw = jax.jit(
        lambda params: reconstruct(objective, params, jnp.asarray(images)),
        out_shardings=replicated(trainer.mesh),
    )

    def write(step: int, params: Any, batch: Any) -> None:
        del batch
        rows = draw(params)
        if jax.process_index() != 0:
            return
        path = workdir / "reconstructions" / f"step_{step}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            _write(path, sheet(np.asarray(rows)))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror}; free some space or set "
                "mae.pictures_every_epochs to 0"
            ) from error

    return write


def reconstruct(
    objective: Any, params: Params, images: UInt8[Array, "batch h w c"]
) -> Float[Array, "3 batch h w c"]:
    """The images, what is visible of them on grey, and reconstructions, on a scale from 0 to 1."""
    side, size = objective.model.patch_size, objective.model.image_size
    normalised = normalise(images, objective.mean, objective.std)
    order = objective.evaluation_order(jnp.int32(0), normalised)
    patches = patchify(normalised, side)
    drawn = objective.predict(params, normalised, order).astype(patches.dtype)
    if objective.norm_pixels:
        mean, deviation = patch_statistics(patches)
        drawn = drawn * deviation + mean
    masked = (ranks(order) >= objective.kept)[:, :, None]
    mean, std = (jnp.asarray(v).reshape(1, 1, 1, -1) for v in (objective.mean, objective.std))
    original, drawn = (
        unpatchify(each, size, side) * std + mean
        for each in (patches, jnp.where(masked, drawn, patches))
    )
    hidden = unpatchify(jnp.broadcast_to(masked, patches.shape), size, side)
    return jnp.clip(jnp.stack([original, jnp.where(hidden, _GREY, original), drawn]), 0, 1)


def sheet(rows: Float[np.ndarray, "rows images h w c"]) -> UInt8[np.ndarray, "height width c"]:
    """One picture of rows of images, small ones enlarged, with white between them."""
    scale = max(1, -(-_SIDE // min(rows.shape[2:4])))
    levels = np.round(255 * rows).astype(np.uint8).repeat(scale, axis=2).repeat(scale, axis=3)
    spaced = np.pad(
        levels, ((0, 0), (0, 0), (0, _GAP), (0, _GAP), (0, 0)), constant_values=255
    ).swapaxes(1, 2)
    count, height, images, width, channels = spaced.shape
    whole: np.ndarray = spaced.reshape(count * height, images * width, channels)
    return whole[:-_GAP, :-_GAP]


def _first_images(trainer: Any) -> UInt8[np.ndarray, "images h w c"]:
    """The same on every process."""
    batches = eval_batches(
        trainer.eval_split,
        batch_size=min(IMAGES, len(trainer.eval_split)),
        image_size=trainer.model.image_size,
        crop_pct=trainer.config.eval.crop_pct,
    )
    try:
        images: np.ndarray = next(batches)["image"]
    finally:
        batches.close()
    return images


def _write(path: Path, picture: UInt8[np.ndarray, "height width c"]) -> None:
    from PIL import Image

    colour = picture if picture.shape[-1] == 3 else picture[..., 0]
    with atomic_replace(path) as temporary:
        Image.fromarray(colour).save(temporary, format="PNG")
