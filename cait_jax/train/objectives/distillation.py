"""Teachers: a network that runs beside the student, or recorded logits; and the losses against them."""

import functools
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from cait_jax.errors import UserError, setting, some
from cait_jax.evaluation.labels import LabelError, match_classes
from cait_jax.models.cait import CaiT
from cait_jax.models.layers import Images
from cait_jax.models.zoo import Network
from cait_jax.reading import check_regular

Logits = Float[Array, "batch classes"]
Losses = Float[Array, "batch"]
Teacher = Callable[[Images], Logits]

_ROWS_CHECKED = 4096


def logits_and_losses(
    objective: Any, params: Any, batch: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Logits, Losses]:
    """Of a `Supervised` objective with a teacher: logits to compare with the label, and the loss of each example.

    A distilled network's second head is compared with the teacher, else its only one. `options` are those of
    `model.apply`.
    """
    variables, images = {"params": params}, batch["image"]
    if objective.model.distilled:
        logits, head = both_heads(objective.model, variables, images, **options)
    else:
        logits = head = objective.model.apply(variables, images, **options)
    losses = objective.label_loss(logits, batch["target"])
    teacher = batch["teacher"] if "teacher" in batch else objective.teacher(images)
    return logits, objective.teacher_loss(losses, head, teacher)


def loss_from_config(config: ConfigDict) -> Callable[..., Losses]:
    """`hard_distillation` or `soft_distillation`, as `distill.kind` is `"hard"` or `"soft"`."""
    distill = config.distill
    if distill.kind == "hard":
        return functools.partial(hard_distillation, weight=distill.alpha)
    return functools.partial(
        soft_distillation, temperature=distill.temperature, weight=distill.alpha
    )


def hard_distillation(
    label_loss: Losses, logits: Logits, teacher_logits: Logits, weight: float = 0.5
) -> Losses:
    """`(1 - weight) * label_loss + weight * CE(logits, argmax teacher_logits)` (arXiv 2012.12877, eq. 3).

    DeiT has two heads: `label_loss` is the class head's, `logits` are the distillation head's (section 4). CaiT
    has one, and both are its own. That is an assumption: no public code of CaiT's distillation was found, and
    DeiT's raises for a network with a single output.
    """
    chosen = jnp.argmax(teacher_logits, axis=-1)
    distillation = optax.softmax_cross_entropy_with_integer_labels(logits, chosen)
    losses: Losses = (1 - weight) * label_loss + weight * distillation
    return losses


def soft_distillation(
    label_loss: Losses,
    logits: Logits,
    teacher_logits: Logits,
    temperature: float = 1.0,
    weight: float = 0.5,
) -> Losses:
    """`(1 - weight) * label_loss + weight * temperature^2 * KL(teacher || student)` (arXiv 2012.12877, eq. 2).

    The defaults, temperature 1 and weight 0.5, are those of DeiT's published code; its paper has 3 and 0.1. The
    divergence is a sum over classes, as in the equation; the code also divides it by their number
    (facebookresearch/deit, `losses.py`).
    """
    student = jax.nn.log_softmax(logits / temperature)
    teacher = jax.nn.log_softmax(jax.lax.stop_gradient(teacher_logits) / temperature)
    divergence = optax.losses.kl_divergence_with_log_targets(student, teacher)
    losses: Losses = (1 - weight) * label_loss + weight * temperature**2 * divergence
    return losses


def teacher_from_config(config: ConfigDict, model: Any) -> Teacher | None:
    """The teacher of `distill.teacher`, a released name or a directory, in bfloat16; None for recorded logits.

    Raises:
      UserError: its weights cannot be had, or, before they are read, it does not fit `model` or the data.
    """
    from cait_jax.weights.pretrained import load_model, load_pretrained, preprocessing

    if config.distill.logits is not None:
        return None
    name = config.distill.teacher
    options = _options(config, model, preprocessing(name))
    _check_teacher(load_model(name), **options)
    teacher, variables = load_pretrained(name, weights=config.distill.weights)
    return make_teacher(teacher, variables, **options)


def make_teacher_for(
    config: ConfigDict, model: Any, teacher: Network, variables: Any, preprocessing: Any
) -> Teacher:
    """`make_teacher` with a config's normalisation; `variables` may be shapes, if no step will run."""
    return make_teacher(teacher, variables, **_options(config, model, preprocessing))


def _options(config: ConfigDict, model: Any, preprocessing: Any) -> dict[str, Any]:
    return {
        "mean": preprocessing.mean,
        "std": preprocessing.std,
        "student_mean": config.data.mean,
        "student_std": config.data.std,
        "num_classes": model.num_classes,
    }


def check_teacher_classes(config: ConfigDict, class_names: Sequence[str]) -> None:
    """Refuses a teacher in a directory that records class names, if they are others or in another order.

    Args:
      config: `distill.teacher` is read.
      class_names: of the student, in the order of its logits.

    Raises:
      UserError: see above.
    """
    name = config.distill.teacher
    if config.distill.logits is not None or name is None:
        return
    from cait_jax.weights.hub_files import is_address
    from cait_jax.weights.pretrained import load_settings

    if not (Path(name).is_dir() or is_address(name)):
        return

    names = load_settings(name).label_names
    if names is None or len(names) != len(class_names):
        return
    try:
        same = np.array_equal(match_classes(class_names, names, len(names)), range(len(names)))
    except LabelError:
        same = False
    if not same:
        raise UserError(
            f"the teacher {name} knows the classes {some(names)} in this order, and the student learns "
            f"{some(class_names)}: choose a teacher of the same classes, or record its logits with cait "
            "evaluate --logits for --config.distill.logits"
        )


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
    """A function from the student's images to the logits of a fixed teacher.

    The teacher sees the student's augmented and mixed images, in its own normalisation and in evaluation mode. A
    convolutional teacher sees them at the student's size, as in the published code (`losses.py` of
    facebookresearch/deit); a transformer, whose positions are of one size, gets them resized to that (bicubic,
    antialiased).

    The function is a pytree (`jax.tree_util.Partial`) that holds the variables as leaves. Give it to a jitted
    function as an argument: closed over, the variables would be constants of the compiled program.

    Args:
      model: any model of `create_model` with a head.
      variables: its variables, `batch_stats` included.
      mean: the teacher's normalisation, one value a channel or one for all, on a scale from 0 to 1; so is `std`.
      std: see `mean`.
      student_mean: the normalisation of the images it is given; so is `student_std`.
      student_std: see `student_mean`.
      num_classes: of the student, to be compared; None: not compared.
      dtype: of the teacher's computation; logits are at least float32.

    Returns:
      A function of images (batch, height, width, channels) to logits (batch, classes).

    Raises:
      UserError: for a teacher without a head or with other classes, or a normalisation of other channels.
    """
    statistics = {
        "mean": mean, "std": std, "student_mean": student_mean, "student_std": student_std
    }  # fmt: skip
    _check_teacher(model, num_classes=num_classes, **statistics)
    to_mean, to_std, from_mean, from_std = (
        np.asarray(values, np.float64) for values in statistics.values()
    )
    scale, shift = from_std / to_std, (from_mean - to_mean) / to_std
    unchanged = bool(np.all(scale == 1) and np.all(shift == 0))
    network = model.clone(dtype=jnp.dtype(dtype))
    any_size = not isinstance(network, CaiT)

    def logits_of(variables: Mapping[str, Any], images: Images) -> Logits:
        images = jnp.asarray(images)
        if not unchanged:
            images = _affine(images, scale, shift)
        size = (images.shape[0], *network.image_size, images.shape[-1])
        if images.shape != size and not any_size:
            images = jax.image.resize(images, size, "cubic", antialias=True)
        applied: Any = network.apply(variables, images)
        logits: Logits = jax.lax.stop_gradient(applied)
        return logits

    return jax.tree_util.Partial(logits_of, variables)


def _check_teacher(
    model: Network, *, num_classes: int | None, **statistics: Sequence[float]
) -> None:
    """Refuses what `make_teacher` does."""
    if not model.num_classes:
        raise UserError("the teacher has no head to teach with: choose one that has")
    if num_classes is not None and num_classes != model.num_classes:
        raise UserError(
            f"the teacher knows {model.num_classes} classes and the student {num_classes}: choose a "
            "teacher trained on the student's classes"
        )
    for name, values in statistics.items():
        if len(values) not in (1, model.in_channels):
            raise UserError(
                f"{name} has {len(values)} values and the teacher's images {model.in_channels} channels: "
                "give one value for each channel, or one for all"
            )
        if "std" in name and not min(values) > 0:
            raise UserError(f"{name} is {tuple(values)}: give numbers above 0")


def _affine(images: Any, scale: np.ndarray, shift: np.ndarray) -> Array:
    shape = (1, 1, 1, -1)
    factor, offset = (jnp.asarray(v, images.dtype).reshape(shape) for v in (scale, shift))
    scaled: Array = images * factor + offset
    return scaled


def both_heads(
    model: nn.Module, variables: Mapping[str, Any], images: Images, **options: Any
) -> tuple[Logits, Logits]:
    """Logits of the class head and of the distillation head of one forward pass (arXiv 2012.12877, section 4).

    Args:
      model: a CaiT or ViT with `distilled=True`.
      variables: of the model.
      images: normalised.
      **options: of `model.apply`, such as `train`, `example_ids` and `rngs`.

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
      examples: of the split.
      num_classes: of the student.

    Raises:
      UserError: the file is missing or damaged, or its logits are of another shape or dtype, or not finite.
    """
    path = Path(path)
    if not path.exists():
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
    for start in range(0, examples, _ROWS_CHECKED):
        finite = np.isfinite(logits[start : start + _ROWS_CHECKED]).all(axis=1)
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
    check_regular(path)
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


def recorded_logits(config: ConfigDict, examples: int, class_names: Sequence[str]) -> Any:
    """The logits in the file `distill.logits`, (examples, classes), in the order of the student's classes.

    Args:
      config: `distill.logits` and `distill.kind` are read.
      examples: of the training split.
      class_names: of the student. Logits whose file names their classes are permuted to this order.

    Raises:
      UserError: the file does not fit, or there is no distillation.
    """
    path = config.distill.logits
    if config.distill.kind == "none":
        raise UserError(
            f"{setting('config.distill.logits')} is given and nothing learns from it: set "
            f"{setting('config.distill.kind')} to hard or soft"
        )
    logits = read_logits(path, examples, len(class_names))
    names = recorded_class_names(path)
    if names is None:
        return logits
    try:
        columns = match_classes(class_names, names, len(names))
    except LabelError as error:
        raise UserError(
            f"the logits in {path} are of the classes {some(names)}, and the student learns "
            f"{some(class_names)}: record them with a teacher of the same classes"
        ) from error
    return logits if np.array_equal(columns, range(len(names))) else logits[:, columns]
