"""Batches as a function of split, seed and step.

Row `r` of the batch of a step has position `step * batch_size + grouped_positions(batch_size, mix_rows)[r]`. Its
example follows from the position by the `Sampler`, its crop from draws keyed with seed and position. So neither
the number of processes nor that of workers changes a batch, and resuming needs the step alone.
"""

import functools
import itertools
import logging
import multiprocessing
import os
import re
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int, UInt8

from cait_jax.data.sampler import CROPPING, BatchSlice, Sampler, philox
from cait_jax.data.split import BrokenImage, Encoded, InMemory, Split, read_record, record_name
from cait_jax.errors import UserError, Way, advise

Batch = dict[str, np.ndarray]
Crop = Callable[..., UInt8[np.ndarray, "h w c"]]

MAX_BROKEN = 0.01
"""The greatest fraction of the images read in training that may be broken."""
JUDGED_FROM = 100
"""How many images are read before that fraction is judged; as many broken ones in a row are too many at once."""
_WORKER_ENDED = re.compile(r"terminated unexpectedly with exit code (-?\d+)")  # Grain's message
_MAX_THREADS = 16
_log = logging.getLogger(__name__)


class Batches(Iterator[Batch], AbstractContextManager["Batches", None]):
    """Owns the threads and processes behind its batches, and ends them when closed, exhausted or failing.

    Workers send with each training example how many broken ones it replaces (`skipped`). `broken` counts these,
    and the log names them: which they were follows from the order, and the reason is found by reading them again.
    """

    def __init__(
        self,
        batches: Any,
        examples: "_TrainingExamples | None" = None,
        extras: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Takes over an iterator with a `close` method; rows of `extras` are added by its batches' `index`."""
        self._batches, self._examples, self._extras = batches, examples, extras or {}
        self._step = self.broken = 0
        self._why_broken: dict[int, str] = {}

    def __next__(self) -> Batch:
        if self._batches is None:
            raise StopIteration
        try:
            batch = next(self._batches)
            if self._examples is not None:
                self._count_broken(self._examples, np.asarray(batch.pop("skipped")))
            index = batch.pop("index", None)
        except BaseException as error:
            self.close()
            ended = isinstance(error, RuntimeError) and _WORKER_ENDED.search(str(error))
            if not ended:
                raise
            ways = advise(Way("lower {}", "workers"), Way("lower {}", "batch_size"))
            raise UserError(
                f"a process that decodes images ended with exit code {ended[1]}, for lack of memory if it "
                f"is -9: {ways}"
            ) from error
        # Workers' arrays are in shared memory that lives no longer than Grain's own array class.
        copied = {k: v if type(v) is np.ndarray else np.array(v) for k, v in batch.items()}
        return copied | {name: rows[np.asarray(index)] for name, rows in self._extras.items()}

    def _count_broken(self, examples: "_TrainingExamples", skipped: np.ndarray) -> None:
        for row in np.flatnonzero(skipped).tolist():
            number = self._step * skipped.size + row
            for index in itertools.islice(examples.candidates(number), skipped[row]):
                if index not in self._why_broken:
                    self._why_broken[index] = examples.why_broken(number, index)
                    _log.warning("%s; it is replaced", self._why_broken[index])
        self._step += 1
        self.broken += int(skipped.sum())
        read = self._step * skipped.size + self.broken
        if read >= JUDGED_FROM and self.broken > MAX_BROKEN * read:
            raise BrokenImage(
                f"{self.broken} of {read} images read are broken, more than {MAX_BROKEN:.0%}, and "
                f"are named in the log (the last: {[*self._why_broken.values()][-1]}); repair or "
                "replace the data set"
            )

    def close(self) -> None:
        """Ends the threads and processes; calling it again does nothing."""
        batches, self._batches = self._batches, None
        if batches is not None:
            batches.close()

    def __exit__(self, *exception: object) -> None:
        self.close()


class PrefetchIterator(Iterator[Batch], AbstractContextManager["PrefetchIterator", None]):
    """The first `count` of `batches`, of which one is loaded from the start; closing does not wait.

    Starting and ending the processes that decode images takes seconds, so a thread does both.

    Attributes:
      before_each: is called before a batch is waited for.
    """

    def __init__(self, batches: Batches, count: int) -> None:
        self.before_each: Callable[[], None] = lambda: None
        self._batches, self._left = batches, count
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "prefetch")
        self._first: Future[Batch] | None = self._thread.submit(next, batches)

    def __next__(self) -> Batch:
        if self._thread is None or not self._left:
            raise StopIteration
        self._left -= 1
        self.before_each()
        first, self._first = self._first, None
        return next(self._batches) if first is None else first.result()

    def close(self) -> None:
        """Starts to close the batches; calling it again does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(self._batches.close)
            thread.shutdown(wait=False)

    def __exit__(self, *exception: object) -> None:
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
    crop: Crop | None = None,
    balance_labels: Int[np.ndarray, "n"] | None = None,
    repeats: int = 1,
    mix_rows: int = 0,
    extras: Mapping[str, np.ndarray] | None = None,
) -> Batches:
    """This process's rows of the training batches from `start_step` on, without end.

    A broken image is replaced by the next in the epoch's order, with its own label, and named once in the log.
    Images in memory come whole, encoded ones cropped.

    Args:
      seed: decides order and crops.
      batch_size: rows of the global batch.
      workers: processes that decode; with 0, threads of this one do.
      crop: from an encoded image and a generator to a crop, with the keywords `image_size`, `channels` and
        `exif`; by default `decode.random_resized_crop`. Picklable if there are workers.
      balance_labels: the labels of the split, if every class shall come equally often.
      repeats: how often each example comes in a row, see `Sampler`.
      mix_rows: rows that will be mixed with each other, see `grouped_positions`.
      extras: arrays with a row for each example of the split, such as a teacher's logits, for the batches.

    Returns:
      Batches of `image`, uint8 (b, height, width, channels), `label`, int32 (b,), and the rows of `extras`; b is
      `batch_size / process_count`.

    Raises:
      UserError: the batch is larger than the split or does not divide by the processes, or the images in memory
        have another size.
      BrokenImage: while iterating, after `JUDGED_FROM` images of which more than `MAX_BROKEN` are broken.
    """
    _check(split, batch_size, image_size, process_count)
    if batch_size > len(split):
        raise UserError(
            f"a batch of {batch_size} examples is larger than the split, which has {len(split)}; "
            f"choose a batch size of at most {len(split)}"
        )
    rows = BatchSlice(batch_size, process_index, process_count, start_step, mix_rows)
    sampler = Sampler(seed, len(split), repeats, balance_labels)
    if isinstance(split, InMemory):
        from cait_jax.data.in_memory import train_rows

        return Batches(train_rows(split, sampler, rows), extras=extras)
    from cait_jax.data.decode import random_resized_crop

    crop = crop or random_resized_crop
    crop = functools.partial(crop, image_size=image_size, channels=split.channels, exif=split.exif)
    examples = _TrainingExamples(split, sampler, rows, crop)
    return Batches(_grain_batches(examples, rows.local_size, workers), examples, extras)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    image_size: tuple[int, int],
    process_index: int = 0,
    process_count: int = 1,
    workers: int = 0,
    crop_pct: float = 1.0,
) -> Batches:
    """This process's rows of the batches that hold every example once, in order.

    Every process gets `ceil(n / batch_size)` batches; rows past the last example are zeros. Images in memory come
    whole, encoded ones as `decode.center_crop`. Arguments and errors are as for `train_batches`.

    Returns:
      Batches as of `train_batches` with `mask`, bool (b,), False for padding. Of a split with `multi_label` also
      `labels`, bool (b, classes), True for each correct class.

    Raises:
      BrokenImage: while iterating, if an image cannot be read or decoded; it is named.
    """
    _check(split, batch_size, image_size, process_count)
    rows = BatchSlice(batch_size, process_index, process_count)
    steps = -(-len(split) // batch_size)
    if isinstance(split, InMemory):
        from cait_jax.data.in_memory import eval_rows

        return Batches(eval_rows(split, rows, steps))
    from cait_jax.data.decode import center_crop

    crop = functools.partial(
        center_crop,
        image_size=image_size,
        crop_pct=crop_pct,
        channels=split.channels,
        exif=split.exif,
    )
    examples = _EvaluationExamples(split, rows, steps, crop, (*image_size, split.channels))
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


@dataclass(frozen=True)
class _TrainingExamples:
    """This process's training examples: number `i` is in row `i % local_size` of batch `i // local_size`."""

    split: Encoded
    sampler: Sampler
    rows: BatchSlice
    crop: Crop

    def __len__(self) -> int:
        # As good as endless, and small enough for Grain's arithmetic on lengths.
        return 2**60 // self.rows.local_size * self.rows.local_size

    def __getitem__(self, number: int) -> Batch:
        """The example, its `index` in the split, and in `skipped` how many broken ones it replaces."""
        for skipped, index in enumerate(self.candidates(number)):
            try:
                example = self.example(number, index)
            except BrokenImage as error:
                last = error
            else:
                return example | {"index": np.array(index), "skipped": np.array(skipped, np.int32)}
        raise BrokenImage(
            f"{skipped + 1} images in a row are broken, of which the last says: {last}; "
            "repair or replace the data set"
        ) from last

    def candidates(self, number: int) -> Iterator[int]:
        position = int(self.rows.position(number))
        return itertools.islice(self.sampler.candidates(position), JUDGED_FROM)

    def example(self, number: int, index: int) -> Batch:
        """Example `index` of the split, cropped as number `number` of this process."""
        position = int(self.rows.position(number))
        rng = np.random.Generator(philox(self.sampler.seed, position, CROPPING))
        return _example(self.split, index, lambda data: self.crop(data, rng))

    def why_broken(self, number: int, index: int) -> str:
        try:
            self.example(number, index)
        except BrokenImage as error:
            return str(error)
        return f"image {index} could not be read a moment ago and now can"


@dataclass(frozen=True)
class _EvaluationExamples:
    """This process's examples of an evaluation with their padding, in order."""

    split: Encoded
    rows: BatchSlice
    steps: int
    crop: Crop
    shape: tuple[int, int, int]

    def __len__(self) -> int:
        return self.steps * self.rows.local_size

    def __getitem__(self, number: int) -> Batch:
        position = int(self.rows.position(number))
        if position < len(self.split):
            try:
                return _example(self.split, position, self.crop) | {"mask": np.array(True)}
            except BrokenImage as error:
                raise BrokenImage(f"{error}; remove or replace it") from error
        padding: Batch = {"image": np.zeros(self.shape, np.uint8), "label": np.array(0, np.int32)}
        if self.split.multi_label:
            padding["labels"] = np.zeros(self.split.num_classes, np.bool_)
        return padding | {"mask": np.array(False)}


def _example(split: Encoded, index: int, crop: Crop) -> Batch:
    record = read_record(split, index)
    try:
        image = crop(record["image"])
    except BrokenImage as error:
        raise BrokenImage(f"{record_name(index, record)} cannot be decoded: {error}") from error
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
        buffered = grain.ReadOptions(threads, prefetch_buffer_size=max(threads, 2 * batch_size))
        return iter(dataset.to_iter_dataset(buffered).batch(batch_size))

    if not flags.FLAGS.is_parsed():  # Grain reads absl flags when it starts its workers
        flags.FLAGS.mark_as_parsed()
    # A worker makes whole batches, so that the number of workers does not decide what a batch holds.
    unbuffered = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    batches = dataset.batch(batch_size).to_iter_dataset(unbuffered)
    options = grain.MultiprocessingOptions(num_workers=workers)
    return iter(batches.mp_prefetch(options, worker_init_fn=_start_worker))


def _start_worker(index: int, count: int) -> None:
    """Keeps a worker to one core, and has its parent's end, not signals, end it."""
    import cv2

    del index, count
    cv2.setNumThreads(1)
    # A signal to the process group must leave the parent the data of the steps until it saves.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def exit_with_parent() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
            os._exit(1)

    threading.Thread(target=exit_with_parent, daemon=True).start()
