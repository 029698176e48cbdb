"""Teachers: a network beside the student, or logits recorded from one; and the student's two heads."""

import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.errors import UserError
from cait_jax.models.layers import Images
from cait_jax.models.regnet import RegNetY
from cait_jax.models.zoo import Network

Logits = Float[Array, "batch classes"]
Teacher = Callable[[Images], Logits]

_FINITE_ROWS = 4096


def make_teacher(
    model: Network,
    variables: Mapping[str, Any],
    *,
    mean: Sequence[float],
    std: Sequence[float],
    student_mean: Sequence[float],
    student_std: Sequence[float],
    num_classes: int | None = None,
    dtype: Any = jnp.bfloat16,
) -> Teacher:
    """Makes a function from the student's images to the logits of a teacher that learns nothing.

    The teacher sees the student's augmented and mixed images, in its own normalisation and in evaluation mode. A
    convolutional teacher sees them at the student's size, as in the published code (`losses.py` of
    facebookresearch/deit); a transformer, whose positions are of one size, gets them resized to that (bicubic,
    antialiased).

    The function is a pytree (`jax.tree_util.Partial`) that holds the variables as leaves. Give it to a jitted
    function as an argument: closed over, the variables would be constants of the compiled program.

    Args:
      model: any model of `create_model` with a head.
      variables: its variables, `batch_stats` and all.
      mean: of each channel (or one for all) in the teacher's input, on a scale from 0 to 1.
      std: likewise.
      student_mean: of each channel (or one for all) in the images it will be given.
      student_std: likewise.
      num_classes: classes of the student, if they are to be compared.
      dtype: what the teacher computes in; its logits are at least float32.

    Returns:
      A function of images (batch, height, width, channels), normalised for the student, to logits
        (batch, classes).

    Raises:
      UserError: for a teacher without a head, with other classes than the student's, or for means and deviations
        that fit no image of the teacher.
    """
    if not model.num_classes:
        raise UserError("the teacher has no head to teach with: choose one that has")
    if num_classes is not None and num_classes != model.num_classes:
        raise UserError(
            f"the teacher knows {model.num_classes} classes and the student {num_classes}: choose a "
            "teacher trained on the student's classes"
        )
    statistics = {
        "mean": mean, "std": std, "student_mean": student_mean, "student_std": student_std
    }  # fmt: skip
    for name, values in statistics.items():
        if len(values) not in (1, model.in_channels):
            raise UserError(
                f"{name} has {len(values)} values and the teacher's images {model.in_channels} channels: "
                "give one value for each channel, or one for all"
            )
        if "std" in name and not min(values) > 0:
            raise UserError(f"{name} is {tuple(values)}: give numbers above 0")
    to_mean, to_std, from_mean, from_std = (
        np.asarray(values, np.float64) for values in statistics.values()
    )
    scale, shift = from_std / to_std, (from_mean - to_mean) / to_std
    unchanged = bool(np.all(scale == 1) and np.all(shift == 0))
    network = model.clone(dtype=jnp.dtype(dtype))
    any_size = isinstance(network, RegNetY)

    def logits_of(variables: Mapping[str, Any], images: Images) -> Logits:
        images = jnp.asarray(images)
        if not unchanged:
            images = _affine(images, scale, shift)
        size = (images.shape[0], *network.image_size, images.shape[-1])
        if images.shape != size and not any_size:
            images = jax.image.resize(images, size, "cubic", antialias=True)
        logits: Any = network.apply(variables, images)
        return jax.lax.stop_gradient(logits)

    return jax.tree_util.Partial(logits_of, variables)


def _affine(images: Any, scale: np.ndarray, shift: np.ndarray) -> Array:
    shape = (1, 1, 1, -1)
    factor, offset = (jnp.asarray(v, images.dtype).reshape(shape) for v in (scale, shift))
    return images * factor + offset


def both_heads(
    model: nn.Module, variables: Mapping[str, Any], images: Images, **options: Any
) -> tuple[Logits, Logits]:
    """Applies a distilled network once and gives its heads apart (Touvron et al., arXiv 2012.12877, section 4).

    What else the network records is not computed under `jax.jit`.

    Args:
      model: a CaiT or ViT with `distilled=True`.
      variables: its variables.
      images: as for `model.apply`.
      **options: of `model.apply`, such as `train`, `example_ids` and `rngs`.

    Returns:
      Logits of the class head, to learn the label, and of the distillation head, to learn from the teacher.

    Raises:
      UserError: for a network of one head.
    """
    if not getattr(model, "distilled", False) or not getattr(model, "num_classes", 0):
        raise UserError(
            "the model has no two heads: choose a distilled one, such as deit_small_distilled, or let "
            "its one head learn from label and teacher"
        )
    _, recorded = model.apply(variables, images, mutable=["intermediates"], **options)
    heads = recorded["intermediates"]
    return heads["logits_class"], heads["logits_distillation"]


def read_logits(
    path: str | Path, examples: int, num_classes: int
) -> Float[np.ndarray, "examples num_classes"]:
    """Reads a teacher's recorded logits: row i is of example i of the split.

    `numpy.savez(path, logits=logits)` writes such a file.

    Args:
      path: an npz file with `logits`, float16 or float32 (examples, classes).
      examples: examples of the split.
      num_classes: classes of the student.

    Returns:
      The logits as they are stored.

    Raises:
      UserError: if there is no such file, it cannot be read, or its logits are missing, of another shape or dtype,
        or not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path} of recorded logits: write one with numpy.savez")
    try:
        logits = _stored_logits(path)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(
            f"{path} cannot be read as logits ({error}): write it again with numpy.savez"
        ) from error
    if logits.dtype not in (np.float16, np.float32):
        raise UserError(f"the logits in {path} are {logits.dtype}: store float16 or float32")
    if logits.shape != (examples, num_classes):
        raise UserError(
            f"the logits in {path} have shape {logits.shape} and the split needs "
            f"{(examples, num_classes)} (examples, classes): record them for this split"
        )
    for start in range(0, examples, _FINITE_ROWS):
        finite = np.isfinite(logits[start : start + _FINITE_ROWS]).all(axis=1)
        if not finite.all():
            raise UserError(
                f"the logits of example {start + int(np.argmin(finite))} in {path} are not finite: "
                "record them again, as float32 if float16 cannot hold them"
            )
    return logits


def recorded_class_names(path: str | Path) -> tuple[str, ...] | None:
    """The classes of recorded logits' columns, where their file has `class_names`, as `cait evaluate` writes."""
    with np.load(path, allow_pickle=False) as stored:
        return tuple(stored["class_names"].tolist()) if "class_names" in stored.files else None


def _stored_logits(path: Path) -> np.ndarray:
    with path.open("rb") as file:  # NumPy would leave its own open where the archive is broken
        stored = np.load(file, allow_pickle=False)
        if not isinstance(stored, np.lib.npyio.NpzFile):
            raise UserError(
                f"{path} is no npz file: write it with numpy.savez(path, logits=logits)"
            )
        if "logits" not in stored.files:
            raise UserError(
                f"{path} holds {', '.join(stored.files) or 'nothing'} and no logits: write it with "
                "numpy.savez(path, logits=logits)"
            )
        return stored["logits"]
