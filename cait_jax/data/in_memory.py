"""Images held in memory: data sets decoded once, scikit-learn's digits, generated ones; and their batches."""

import functools
import io
import itertools
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cait_jax.data.sampler import BatchSlice, Sampler
from cait_jax.data.split import BrokenImage, Encoded, InMemory, record_name
from cait_jax.errors import UserError, nearest

DIGITS_SPLITS = ("train", "test", "fit", "validation")
_DIGITS_HELD_OUT = 360
NAMES = ("synthetic", "synthetic/jpeg")
SPLITS = ("train", "validation")
NUM_CLASSES = 1000
# As many examples as ImageNet-1k has, and its usual size: 110 kB for 400 by 500 pixels.
JPEG_COUNTS = {"train": 1_281_167, "validation": 50_000}
JPEG_SIZE = (400, 500)
_COUNTS = {"train": 4096, "validation": 1024}
_CHUNK = 512
_PICTURES = 64
_QUALITY = 92
_FADING = 1.2
_CLASS_NAMES = tuple(str(number) for number in range(NUM_CLASSES))


def train_rows(
    split: InMemory, sampler: Sampler, rows: BatchSlice
) -> Iterator[dict[str, np.ndarray]]:
    """One process's rows of the batches of training, without end, each with its `index`."""
    for step in itertools.count():
        index = sampler.indices(rows.position(step * rows.local_size + np.arange(rows.local_size)))
        yield {"image": split.images[index], "label": split.labels[index], "index": index}


def eval_rows(split: InMemory, rows: BatchSlice, steps: int) -> Iterator[dict[str, np.ndarray]]:
    """One process's rows of the batches of an evaluation; those past the last example are zeros."""
    for step in range(steps):
        positions = rows.position(step * rows.local_size + np.arange(rows.local_size))
        mask = positions < len(split)
        index = np.where(mask, positions, 0)
        image = np.where(mask[:, None, None, None], split.images[index], np.uint8(0))
        yield {"image": image, "label": np.where(mask, split.labels[index], 0), "mask": mask}


def decoded(split: Encoded, image_size: tuple[int, int], title: str) -> InMemory:
    """Decodes a split whose images are of one size.

    Raises:
      BrokenImage: an image cannot be decoded; it is named.
    """
    from tqdm import tqdm

    from cait_jax.data.decode import decode_image

    records: Any = split.records
    images = np.empty((len(split), *image_size, split.channels), np.uint8)
    labels = np.empty(len(split), np.int32)

    def decode(indices: range) -> int:
        # By the chunk: array_record takes longer to read one record than to decode a small image.
        for index, record in zip(indices, records.__getitems__(list(indices)), strict=True):
            try:
                images[index] = decode_image(record["image"], channels=split.channels)
            except BrokenImage as error:
                raise BrokenImage(
                    f"{record_name(index, record)} cannot be decoded: {error}"
                ) from error
            labels[index] = record["label"]
        return len(indices)

    chunks = [range(i, min(i + _CHUNK, len(split))) for i in range(0, len(split), _CHUNK)]
    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(split), desc=title, unit="image", disable=None, leave=False) as bar,
    ):
        for count in pool.map(decode, chunks):
            bar.update(count)
    return InMemory(images, labels, split.class_names)


@dataclass(frozen=True)
class SyntheticJpegs:
    """Records of JPEG files of noise with the spectrum of photographs; labels are 0 to 999 in turn.

    Each of `_PICTURES` different files is encoded once in a process; record `i` has file `i % _PICTURES`.
    """

    count: int

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """The encoded `image` and its `label`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"image": _jpeg(index % _PICTURES), "label": index % NUM_CLASSES}


def load_digits(split: str, image_size: tuple[int, int]) -> InMemory:
    """scikit-learn's handwritten digits, of 8 by 8 pixels.

    The splits are `"train"` and `"test"`, and `"fit"` and `"validation"`, into which the training examples are
    divided for choosing settings.

    Raises:
      UserError: the split or `image_size` is none of these, or scikit-learn is missing.
    """
    if image_size != (8, 8):
        raise UserError(
            "the digits are 8 by 8 pixels, so the image size must be 8, not "
            f"{image_size[0]} by {image_size[1]}"
        )
    if split not in DIGITS_SPLITS:
        raise UserError(f"digits has no split {split!r}; {nearest(split, DIGITS_SPLITS)}")
    try:
        import sklearn.datasets
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(
            'the digits come with scikit-learn: pip install "cait-jax[digits]"'
        ) from error

    digits = sklearn.datasets.load_digits()

    def divide(indices: np.ndarray, seed: int) -> list[np.ndarray]:
        parts: list[np.ndarray] = train_test_split(
            indices,
            test_size=_DIGITS_HELD_OUT,
            stratify=digits.target[indices],
            random_state=seed,
        )
        return parts

    indices = {}
    indices["train"], indices["test"] = divide(np.arange(len(digits.target)), seed=0)
    indices["fit"], indices["validation"] = divide(indices["train"], seed=1)
    chosen = indices[split]
    return InMemory(
        images=np.round(digits.images[chosen, ..., None] * (255 / 16)).astype(np.uint8),
        labels=digits.target[chosen].astype(np.int32),
        class_names=tuple(str(digit) for digit in digits.target_names),
    )


def load_synthetic(
    name: str, split: str, image_size: tuple[int, int], max_bytes: int
) -> InMemory | Encoded:
    """A split, `"train"` or `"validation"`, of 1,000 classes.

    Args:
      name: `"synthetic"`: uniform noise of `image_size`, in memory; `"synthetic/jpeg"`: JPEG files of ImageNet's
        usual size and number, to be decoded like it.
      max_bytes: limit for the images in memory; of very large ones there are fewer.

    Raises:
      UserError: the name or the split is unknown, or not one image fits.
    """
    if name not in NAMES:
        raise UserError(f"unknown synthetic data {name!r}; {nearest(name, NAMES)}")
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; {nearest(split, SPLITS)}")
    if name == "synthetic/jpeg":
        return Encoded(SyntheticJpegs(JPEG_COUNTS[split]), _CLASS_NAMES, channels=3)

    shape = (*image_size, 3)
    count = min(_COUNTS[split], max_bytes // int(np.prod(shape)))
    if not count:
        raise UserError(
            f"an image of {image_size[0]} by {image_size[1]} pixels is too large for {name}"
        )
    words = np.random.Philox(SPLITS.index(split)).random_raw(-(-count * int(np.prod(shape)) // 8))
    images = words.view(np.uint8)[: count * int(np.prod(shape))].reshape(count, *shape)
    labels = np.arange(count, dtype=np.int32) % NUM_CLASSES
    return InMemory(images, labels, _CLASS_NAMES)


@functools.lru_cache(maxsize=_PICTURES)
def _jpeg(number: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_picture(number)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _picture(number: int) -> UInt8[np.ndarray, "h w 3"]:
    """Noise of eight octaves, the fainter the finer."""
    from PIL import Image

    height, width = JPEG_SIZE
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        cells = (width * 2**octave // 128 + 2, height * 2**octave // 128 + 2)
        shape = (cells[1], cells[0], 3)
        words = np.random.Philox(key=[number, octave]).random_raw(int(np.prod(shape)))
        noise = Image.fromarray((words >> 56).astype(np.uint8).reshape(shape))
        grown = noise.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(grown, np.float32) - 127.5) / _FADING**octave
    levels: np.ndarray = np.clip(total / 1.5 + 127.5, 0, 255)
    return levels.astype(np.uint8)
