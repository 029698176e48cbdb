"""One call from a model and a split to its scores."""

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.data.pipeline import eval_batches
from cait_jax.data.preprocess import Preprocessing
from cait_jax.data.sources import InMemory, Split
from cait_jax.errors import UserError
from cait_jax.evaluation.evaluate import evaluate, jit_eval_step, make_eval_step
from cait_jax.evaluation.labels import choose_classes, choose_rule, measure_of
from cait_jax.evaluation.metrics import finish, zero_sums
from cait_jax.evaluation.progress import show_progress
from cait_jax.sharding import batch_sharding, make_mesh, padded_batch_size, replicated


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a model on a split. Every field is plain, so `json.dumps(scores.as_dict())` works.

    Attributes:
      rule: which classes competed and what was right, see `score`.
      competing: how many classes competed, of the model's `classes`.
      classes: the number of the model's classes.
      matched: whether labels were found among the model's classes by `"name"` or by `"position"`.
      images, counted, not_finite, top1, top5, loss, ece, class_names, class_images, class_accuracy, confusion:
        see `cait_jax.evaluation.metrics.finish`.
      seconds: how long it took, compilation included.
    """

    rule: str
    competing: int
    classes: int
    matched: str
    images: int
    counted: int
    not_finite: int
    top1: float
    top5: float | None
    loss: float | None
    ece: float | None
    class_names: list[str]
    class_images: list[int] | None
    class_accuracy: list[float | None] | None
    confusion: list[list[int]] | None
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        """The fields by name."""
        return dataclasses.asdict(self)


def score(
    model: Any,
    variables: Mapping[str, Any],
    split: Split,
    preprocessing: Preprocessing,
    *,
    batch_size: int = 64,
    rule: str | None = None,
    class_names: Sequence[str] | None = None,
    by_position: bool = False,
    workers: int = 0,
    progress: str | None = None,
    devices: list[jax.Device] | None = None,
) -> Scores:
    """Scores a model on every example of a split, over all devices and processes.

    Rules: `"all"`: every class of the model competes. `"restricted"`: the classes that occur in the split do, as
    on ImageNet-A and ImageNet-R, and softmax is over them alone. `"real"`: every class competes, and any
    of an image's labels is right (`cait_jax.evaluation.metrics.any_of_labels`). Images without a label do
    not count.

    Args:
      model: applied as `model.apply(variables, images)`, which gives logits.
      variables: `{"params": ...}`, and what else the model needs.
      split: of `cait_jax.data.load_split`.
      preprocessing: size, crop, channels and normalisation of the images.
      batch_size: images at a time over all devices, rounded up to a multiple of their number. It does not
        change the scores.
      rule: see above; by default `"real"` for a split with several labels an image, `"restricted"` for one with
        fewer classes than the model, else `"all"`.
      class_names: the names of the model's classes in the order of its logits, by which labels are matched, see
        `cait_jax.evaluation.labels.match_classes`.
      by_position: take label i for class i, whatever their names are.
      workers: processes that decode; with 0 threads of this one do.
      progress: what to call this in a progress bar (on a terminal) or in lines; None for neither.
      devices: the devices to use; all of them if not given.

    Raises:
      UserError: the classes cannot be matched, only one competes, the model has no head, the images do not fit it,
        or no image has a label.
      BrokenImage: an image cannot be decoded; it is named.
    """
    start = time.monotonic()
    if getattr(model, "num_classes", None) == 0:
        raise UserError("the model has no head, so it knows no classes: evaluate one that has")
    split = with_channels(split, preprocessing.channels)
    num_classes = _count_logits(model, variables, preprocessing)
    rule = choose_rule(split, num_classes) if rule is None else rule
    classes = choose_classes(split, rule, num_classes, class_names, by_position=by_position)
    measure = measure_of(rule, classes)
    mesh = make_mesh(devices)
    shown = nullcontext(None) if progress is None else show_progress(len(split), progress)
    with (
        eval_batches(
            split,
            batch_size=padded_batch_size(batch_size, mesh),
            image_size=preprocessing.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=workers,
            crop_ratio=preprocessing.crop_ratio,
        ) as batches,
        shown as update,
    ):
        sums = evaluate(
            jit_eval_step(
                make_eval_step(model, preprocessing.mean, preprocessing.std, measure), mesh
            ),
            jax.device_put(variables, replicated(mesh)),
            batches,
            batch_sharding(mesh),
            zero_sums(measure, num_classes),
            update,
        )
    scores = finish(sums, classes.names)
    return Scores(
        rule=rule,
        competing=len(classes.names),
        classes=num_classes,
        matched=classes.matched,
        **scores,
        seconds=time.monotonic() - start,
    )


def with_channels(split: Split, channels: int) -> Split:
    """The split decoded to colour or luminance as a model wants it.

    Args:
      split: of `cait_jax.data.load_split`.
      channels: 3 for colour, 1 for luminance.

    Raises:
      UserError: the split is in memory with other channels.
    """
    if split.channels == channels:
        return split
    if isinstance(split, InMemory):
        raise UserError(
            f"the images of the split have {split.channels} channel(s) and the model takes {channels}; "
            f"evaluate a model of {split.channels} channel(s)"
        )
    return dataclasses.replace(split, channels=channels)


def _count_logits(model: Any, variables: Mapping[str, Any], preprocessing: Preprocessing) -> int:
    shape = (1, *preprocessing.image_size, preprocessing.channels)
    logits = jax.eval_shape(model.apply, variables, jax.ShapeDtypeStruct(shape, jnp.float32))
    return logits.shape[-1]
