"""Batches as a function of split, seed and step.

Position `p = step * batch_size + place` of training, counted over all processes, is example
`permutation(seed, p // n)[p % n // repeats]` of a split of `n` examples, cropped by draws keyed with
`seed` and `p`. Row r of a batch has `place = grouped_positions(batch_size, mix_rows)[r]`: r, without groups. So
neither the number of processes nor that of workers changes a batch, and resuming needs the step alone.
"""

import functools
import itertools
import logging
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cait_jax.data.order import CROPPING, Chosen, Order, Rows, permutation, philox
from cait_jax.data.sources import Encoded, InMemory, Split, read_record, record_name
from cait_jax.errors import UserError, Way, advise

Batch = dict[str, np.ndarray]

MAX_BROKEN = 0.01
"""The greatest part of the images read that may be broken in training."""
JUDGED_FROM = 100
"""How many images are read before that part is judged; as many broken ones in a row are too many at once."""

# Grain's message.
_WORKER_ENDED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")
_MAX_THREADS = 16
_log = logging.getLogger(__name__)


class Batches(Iterator[Batch]):
    """An iterator over batches that owns the threads and processes behind it.

    Closing it ends them; so does exhausting it, an error, or leaving its `with` block.
    """

    def __init__(
        self,
        batches: Any,
        replaced: "_Replaced | None" = None,
        beside: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Takes over `batches`, an iterator with a `close` method.

        Args:
          batches: what to iterate over; in training with `index`, the place of each example in its split.
          replaced: what keeps account of broken images.
          beside: arrays with a row for each example of the split, which go into the batches.
        """
        self._batches = batches
        self._replaced = replaced
        self._beside = dict(beside or {})

    @property
    def broken(self) -> int:
        """How many times a broken image was read and replaced in the batches so far."""
        return 0 if self._replaced is None else self._replaced.broken

    def __next__(self) -> Batch:
        """The next batch; no more come after `close`."""
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
            if self._replaced is not None:
                self._replaced.account(batch)
            index = batch.pop("index", None)
        except BaseException as error:
            self.close()
            if isinstance(error, RuntimeError) and (ended := _WORKER_ENDED.search(str(error))):
                ways = advise(Way("lower {}", "workers"), Way("lower {}", "batch_size"))
                raise UserError(
                    f"a process that decodes images ended with exit code {ended[1]}, for lack of memory if it is "
                    f"-9: {ways}"
                ) from error
            raise
        # Workers' arrays lie in shared memory that lives no longer than Grain's own array class.
        whole = {
            name: array if type(array) is np.ndarray else np.array(array)
            for name, array in batch.items()
        }
        return whole | {name: rows[np.asarray(index)] for name, rows in self._beside.items()}

    def close(self) -> None:
        """Ends the threads and processes; calling it again does nothing."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    def __enter__(self) -> "Batches":
        """Returns itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()


def train_batches(
    split: Split,
    *,
    seed: int,
    batch_size: int,
    image_size: tuple[int, int],
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    crop: Callable[..., UInt8[np.ndarray, "h w c"]] | None = None,
    order: Order | None = None,
    repeats: int = 1,
    mix_rows: int = 0,
    beside: Mapping[str, np.ndarray] | None = None,
) -> Batches:
    """Yields this process's rows of the training batches from `start_step` on, without end.

    An image that cannot be read or decoded is named once by a warning in the log, and the next in the
    epoch's order stands in for it, with its own label, for whichever process or worker meets it.
    `Batches.broken` counts them.

    Args:
      split: what to draw from. Images in memory come whole; encoded ones cropped at random.
      seed: decides order and crops.
      batch_size: rows of the global batch.
      image_size: height and width of the images in pixels.
      start_step: the step of the first batch.
      process_index: which process this is.
      process_count: into how many processes the global batch is divided.
      workers: processes that decode; with 0 threads of this one do. Images in memory need none.
      crop: from an encoded image and a generator to a crop, with the keywords `image_size`, `channels` and
        `exif`; `decode.random_resized_crop` if not given. Picklable if there are workers.
      order: from an epoch to the order of its examples; `permutation` with this seed if not given.
      repeats: how often each example comes in a row, cropped and augmented anew. An epoch stays as long as
        the split, so it holds the first `1 / repeats` of its order (repeated augmentation, Hoffer et
        al., arXiv 1901.09335).
      mix_rows: rows that will be mixed with each other (`cait_jax.augment.mixup`): the copies of an image are put
        into different groups of so many rows. 0: the rows are in order.
      beside: arrays with a row for each example of the split, such as a teacher's recorded logits.

    Returns:
      Batches with `image`, uint8 (batch_size / process_count, height, width, channels), `label`, int32
      (batch_size / process_count,), and the examples' rows of each array of `beside` under its name.

    Raises:
      UserError: at the call, if the batch is larger than the split or does not divide by the
        processes, or the images in memory have another size.
      BrokenImage: while iterating, if of the images that this process read, `JUDGED_FROM` at least,
        more than `MAX_BROKEN` were broken.
    """
    _check(split, batch_size, image_size, process_count)
    count = len(split)
    if batch_size > count:
        raise UserError(
            f"a batch of {batch_size} examples is larger than the split, which has {count}; "
            f"choose a batch size of at most {count}"
        )
    rows = Rows(batch_size, process_index, process_count, start_step, mix_rows)
    chosen = Chosen(order or functools.partial(permutation, seed, count=count), count, repeats)

    if isinstance(split, InMemory):
        return Batches(_gathered(split, chosen, rows), beside=beside)

    from cait_jax.data.decode import random_resized_crop

    crop = functools.partial(
        crop or random_resized_crop,
        image_size=image_size,
        channels=split.channels,
        exif=split.exif,
    )
    examples = _TrainingExamples(split, seed, rows, crop, chosen)
    batches = _grain_batches(examples, rows.local_size, workers)
    return Batches(batches, _Replaced(examples), beside)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    crop_ratio: float = 1.0,
) -> Batches:
    """Yields this process's rows of the batches that hold every example once, in order.

    Every process gets `ceil(n / batch_size)` batches; rows past the last example are zeros.

    Args:
      split: what to evaluate on.
      batch_size: rows of the global batch.
      image_size: height and width of the images in pixels.
      process_index: which process this is.
      process_count: into how many processes the global batch is divided.
      workers: processes that decode; with 0 threads of this one do. Images in memory need none.
      crop_ratio: the part of the shorter side of an encoded image that its centre crop keeps.

    Returns:
      Batches with `image`, uint8 (batch_size / process_count, height, width, channels), `label`,
      int32 (batch_size / process_count,), and `mask`, bool of the same shape, False for padding.
      Of a split with `multi_label` also `labels`, bool (batch_size / process_count, classes), True
      for each class that is right.

    Raises:
      UserError: at the call, if the batch does not divide by the processes or the images in memory
        have another size.
      BrokenImage: while iterating, if an image cannot be read or decoded; it is named.
    """
    _check(split, batch_size, image_size, process_count)
    rows = Rows(batch_size, process_index, process_count)
    steps = -(-len(split) // batch_size)

    if isinstance(split, InMemory):
        return Batches(_gathered_in_order(split, rows, steps))

    from cait_jax.data.decode import center_crop

    crop = functools.partial(
        center_crop,
        image_size=image_size,
        crop_ratio=crop_ratio,
        channels=split.channels,
        exif=split.exif,
    )
    shape = (*image_size, split.channels)
    examples = _EvaluationExamples(split, rows, steps, crop, shape)
    return Batches(_grain_batches(examples, rows.local_size, workers))


def _check(split: Split, batch_size: int, image_size: tuple[int, int], process_count: int) -> None:
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"a batch of {batch_size} examples cannot be divided evenly among {process_count} "
            f"processes; choose a positive multiple of {process_count}"
        )
    if isinstance(split, InMemory) and split.images.shape[1:3] != image_size:
        held, asked = (f"{size[0]} by {size[1]}" for size in (split.images.shape[1:], image_size))
        raise UserError(
            f"the split was loaded with images of {held} pixels, not {asked}; load it with "
            f"image_size={image_size}"
        )


def _gathered(split: InMemory, chosen: Chosen, rows: Rows) -> Iterator[Batch]:
    for step in itertools.count():
        examples = chosen.at(rows.positions(step))
        yield {
            "image": split.images[examples],
            "label": split.labels[examples],
            "index": examples,
        }


def _gathered_in_order(split: InMemory, rows: Rows, steps: int) -> Iterator[Batch]:
    for step in range(steps):
        positions = rows.positions(step)
        mask = positions < len(split)
        image = np.zeros((rows.local_size, *split.images.shape[1:]), np.uint8)
        label = np.zeros(rows.local_size, np.int32)
        image[mask] = split.images[positions[mask]]
        label[mask] = split.labels[positions[mask]]
        yield {"image": image, "label": label, "mask": mask}


@dataclass(frozen=True)
class _TrainingExamples:
    """This process's training examples, by how many of them came before."""

    split: Encoded
    seed: int
    rows: Rows
    crop: Callable[[bytes, np.random.Generator], UInt8[np.ndarray, "h w c"]]
    chosen: Chosen

    def __len__(self) -> int:
        # As good as endless, and small enough for Grain's arithmetic on lengths.
        return 2**60 // self.rows.local_size * self.rows.local_size

    def __getitem__(self, index: int) -> Batch:
        """The example and, as `skipped`, how many broken ones before it should have been in its place."""
        from cait_jax.data.decode import BrokenImage

        skipped, last = 0, None
        for skipped, chosen in enumerate(self.candidates(int(index))):
            try:
                return {
                    **self.example(int(index), chosen),
                    "index": np.array(chosen, np.int64),
                    "skipped": np.array(skipped, np.int32),
                }
            except BrokenImage as error:
                last = error
        raise BrokenImage(
            f"{skipped + 1} images in a row are broken, of which the last says: {last}; "
            "repair or replace the data set"
        ) from last

    def candidates(self, index: int) -> Iterator[int]:
        """The example that is this process's `index`-th, and those that stand in for it, in their order."""
        return itertools.islice(self.chosen.candidates(self.rows.position(index)), JUDGED_FROM)

    def example(self, index: int, chosen: int) -> Batch:
        """Example `chosen` of the split, cropped as this process's `index`-th is."""
        rng = np.random.Generator(philox(self.seed, self.rows.position(index), CROPPING))
        return _example(self.split, chosen, lambda data: self.crop(data, rng))


class _Replaced:
    """Keeps account of the broken images of training, in the process that receives the batches.

    Workers only say with each example how many broken ones it stands in for. Which those were follows from
    the order, and what is wrong with one shows when it is read again.
    """

    def __init__(self, examples: _TrainingExamples) -> None:
        self._examples = examples
        self._step = 0
        self._named: set[int] = set()
        self._last = ""
        self.read = 0
        self.broken = 0

    def account(self, batch: Batch) -> None:
        """Takes `skipped` out of the next batch, names what is new, and stops if it is too much."""
        from cait_jax.data.decode import BrokenImage

        skipped = np.asarray(batch.pop("skipped"))
        for row in np.flatnonzero(skipped):
            index = self._step * skipped.size + int(row)
            for chosen in itertools.islice(self._examples.candidates(index), int(skipped[row])):
                if chosen not in self._named:
                    self._named.add(chosen)
                    self._last = self._reason(index, chosen)
                    _log.warning("%s; another stands in for it", self._last)
        self._step += 1
        self.broken += int(skipped.sum())
        self.read += skipped.size + int(skipped.sum())
        if self.read >= JUDGED_FROM and self.broken > MAX_BROKEN * self.read:
            raise BrokenImage(
                f"{self.broken} of {self.read} images read are broken, more than {MAX_BROKEN:.0%}, and "
                f"are named in the log (the last: {self._last}); repair or replace the data set"
            )

    def _reason(self, index: int, chosen: int) -> str:
        from cait_jax.data.decode import BrokenImage

        try:
            self._examples.example(index, chosen)
        except BrokenImage as error:
            return str(error)
        return f"image {chosen} could not be read a moment ago and now can"


@dataclass(frozen=True)
class _EvaluationExamples:
    """This process's examples of an evaluation with their padding, in order."""

    split: Encoded
    rows: Rows
    steps: int
    crop: Callable[[bytes], UInt8[np.ndarray, "h w c"]]
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.steps * self.rows.local_size

    def __getitem__(self, index: int) -> Batch:
        position = self.rows.position(int(index))
        if position < len(self.split):
            return {**self._whole(position), "mask": np.array(True)}
        padding: Batch = {
            "image": np.zeros(self.shape, np.uint8),
            "label": np.array(0, np.int32),
            "mask": np.array(False),
        }
        if self.split.multi_label:
            padding["labels"] = np.zeros(self.split.num_classes, np.bool_)
        return padding

    def _whole(self, position: int) -> Batch:
        from cait_jax.data.decode import BrokenImage

        try:
            return _example(self.split, position, self.crop)
        except BrokenImage as error:
            raise BrokenImage(f"{error}; remove or replace it") from error


def _example(
    split: Encoded, index: int, crop: Callable[[bytes], UInt8[np.ndarray, "h w c"]]
) -> Batch:
    from cait_jax.data.decode import BrokenImage

    record = read_record(split, index)
    try:
        image = crop(record["image"])
    except BrokenImage as error:
        name = record_name(index, record)
        raise BrokenImage(f"{name} cannot be decoded: {error}") from error
    example = {"image": image, "label": np.array(record["label"], np.int32)}
    if split.multi_label:
        example["labels"] = np.zeros(split.num_classes, np.bool_)
        example["labels"][np.asarray(record["labels"], np.int64)] = True
    return example


def _grain_batches(
    examples: _TrainingExamples | _EvaluationExamples, batch_size: int, workers: int
) -> Any:
    """An iterator over stacked examples that has a `close` method."""
    import grain
    from absl import flags

    dataset = grain.MapDataset.source(examples)
    if not workers:
        threads = min(_MAX_THREADS, os.cpu_count() or 1)
        ahead = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(threads, 2 * batch_size)
        )
        return iter(dataset.to_iter_dataset(ahead).batch(batch_size))

    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts its workers
        flags.FLAGS.mark_as_parsed()
    # A worker makes whole batches, so that their number does not decide what a batch holds.
    one_by_one = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = dataset.batch(batch_size).to_iter_dataset(one_by_one)
    return iter(
        batches.mp_prefetch(
            grain.MultiprocessingOptions(num_workers=workers), worker_init_fn=_start_worker
        )
    )


def _start_worker(index: int, count: int) -> None:
    """Leaves the end of a worker to its parent, ends it when the parent has died, and keeps it to a core."""
    import cv2

    del index, count
    cv2.setNumThreads(1)
    # A signal to the process group must leave the parent the data of the steps until it saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    import multiprocessing

    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
