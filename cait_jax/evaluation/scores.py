"""One call from a model and a split to its scores; the test sets that models are compared on."""

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from cait_jax.data.folder import purpose_of
from cait_jax.data.loader import Batches, eval_batches
from cait_jax.data.preprocess import Preprocessing
from cait_jax.data.sources import split_names
from cait_jax.data.split import InMemory, Split
from cait_jax.errors import UserError, printable
from cait_jax.evaluation.evaluate import evaluate, jit_eval_step, make_eval_step, zero_sums
from cait_jax.evaluation.labels import choose_classes, choose_rule, metric_fn_for
from cait_jax.evaluation.metrics import compute_scores
from cait_jax.sharding import batch_sharding, make_mesh, padded_batch_size, replicated

SECONDS_BETWEEN_LINES = 30.0


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A data set and split, as `load_split` takes them, and the rule of `score`; None: the one that fits."""

    data: str
    split: str
    rule: str | None = None


_BENCHMARKS = {
    # Russakovsky et al. 2015, arXiv 1409.0575: the labels of its test split are not public.
    "imagenet2012": Benchmark("imagenet2012", "validation", "all"),
    # Recht et al. 2019, arXiv 1902.10811.
    "imagenet_v2": Benchmark("imagenet_v2/matched-frequency", "test", "all"),
    # Beyer et al. 2020, arXiv 2006.07159.
    "imagenet2012_real": Benchmark("imagenet2012_real", "validation", "real"),
    # Hendrycks et al. 2021, arXiv 1907.07174; 200 classes.
    "imagenet_a": Benchmark("imagenet_a", "test", "restricted"),
    # Hendrycks et al. 2021, arXiv 2006.16241; 200 classes.
    "imagenet_r": Benchmark("imagenet_r", "test", "restricted"),
    # Wang et al. 2019, arXiv 1905.13549.
    "imagenet_sketch": Benchmark("imagenet_sketch", "test", "all"),
}
_ALIASES = {"imagenet": "imagenet2012", "imagenet_real": "imagenet2012_real"}
_DEFAULT_PURPOSES = ("test", "val")
_UNDIVIDED = "all"  # a folder that is not divided into splits


def find_benchmark(
    name: str, split: str | None = None, *, data_dir: str | None = None
) -> Benchmark:
    """The split that a name stands for, and the rule by which it is scored.

    Args:
      name: a known benchmark, perhaps with a TFDS configuration or version, or any data set of `load_split`.
      split: default: the benchmark's own; of another data set the test split, else the validation split, by any
        word of `cait_jax.data.folder.purpose_of`, or all of a folder that is not divided.
      data_dir: of the TFDS data sets.
    """
    base, *_ = name.replace(":", "/").split("/")
    known = _BENCHMARKS.get(_ALIASES.get(base, base))
    if known is not None:
        data = known.data if base == name else name.replace(base, _ALIASES.get(base, base), 1)
        return Benchmark(data, split or known.split, known.rule)
    if split is not None:
        return Benchmark(name, split)
    splits = split_names(name, data_dir=data_dir)
    for purpose in _DEFAULT_PURPOSES:
        if named := [each for each in splits if purpose_of(each) == purpose]:
            return Benchmark(name, named[0])
    if _UNDIVIDED in splits:
        return Benchmark(name, _UNDIVIDED)
    raise UserError(
        f"data set {name} has none of the splits test and validation; name one of its own, which are "
        f"{', '.join(splits)}"
    )


@dataclasses.dataclass(frozen=True)
class Scores:
    """The scores of a model on a split. Every field is plain, so `json.dumps(scores.as_dict())` works.

    Attributes:
      rule: see `score`.
      competing: classes that competed, of the model's `classes`.
      matched: labels were matched to the model's classes by `"name"` or by `"position"`.
      images: see `cait_jax.evaluation.metrics.compute_scores` for this and the fields that follow.
      seconds: compilation included.
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
      model: gives logits as `model.apply(variables, images)`.
      variables: `{"params": ...}`, and what else the model needs.
      split: of `cait_jax.data.load_split`.
      preprocessing: size, crop, channels and normalisation of the images.
      batch_size: global, rounded up to a multiple of the devices. It does not change the scores.
      rule: default: `"real"` for a split with several labels an image, `"restricted"` for one with fewer classes
        than the model, else `"all"`.
      class_names: of the model's classes in the order of its logits, by which labels are matched, see
        `cait_jax.evaluation.labels.match_classes`.
      by_position: label i is class i, whatever the names are.
      workers: decoding processes; with 0, threads decode.
      progress: title of a progress bar (on a terminal) or of lines; None for neither.
      devices: default: all.

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
    metric_fn = metric_fn_for(rule, classes)
    mesh = make_mesh(devices)
    step = make_eval_step(model, preprocessing.mean, preprocessing.std, metric_fn)
    shown = contextlib.nullcontext() if progress is None else show_progress(len(split), progress)
    with batches_of(split, preprocessing, batch_size, workers, mesh) as batches, shown as update:
        sums = evaluate(
            jit_eval_step(step, mesh),
            jax.device_put(variables, replicated(mesh)),
            batches,
            batch_sharding(mesh),
            zero_sums(metric_fn, num_classes),
            update,
        )
    return Scores(
        rule=rule,
        competing=len(classes.names),
        classes=num_classes,
        matched=classes.matched,
        **compute_scores(sums, classes.names),
        seconds=time.monotonic() - start,
    )


def batches_of(
    split: Split, preprocessing: Preprocessing, batch_size: int, workers: int, mesh: Mesh
) -> Batches:
    """This process's evaluation batches of a split, `batch_size` padded to the mesh."""
    return eval_batches(
        split,
        batch_size=padded_batch_size(batch_size, mesh),
        image_size=preprocessing.image_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        workers=workers,
        crop_pct=preprocessing.crop_pct,
    )


def with_channels(split: Split, channels: int) -> Split:
    """The split decoded to colour (3 channels) or luminance (1)."""
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
    return int(logits.shape[-1])


@contextlib.contextmanager
def show_progress(total: int, title: str, stream: Any = None) -> Iterator[Callable[[int], None]]:
    """Shows images done and images/s: a bar on a terminal, now and then a line elsewhere; in process 0 only.

    Yields a function to call with the number of images that this process has finished since its last call; the
    other processes, whose images `total` counts too, are assumed to be as fast. `stream` is standard error by
    default.
    """
    if jax.process_index():
        yield lambda images: None
        return
    stream = sys.stderr if stream is None else stream
    title = printable(title)
    processes = jax.process_count()
    if not stream.isatty():
        yield _progress_lines(total, title, stream, processes)
        return

    from tqdm import tqdm

    with tqdm(
        total=total, desc=title, unit="image", unit_scale=True, file=stream, leave=False
    ) as bar:

        def update(images: int) -> None:
            bar.update(min(images * processes, total - bar.n))

        yield update


def _progress_lines(total: int, title: str, stream: Any, processes: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def update(images: int) -> None:
        nonlocal last, done
        done = min(total, done + images * processes)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            stream.write(f"{title}: {done:,} of {total:,} images, {rate:,.0f} images/s\n")
            stream.flush()

    return update
