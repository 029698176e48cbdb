"""One split of a data set: decoded images in memory, or encoded images by index."""

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int32, UInt8

from cait_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

IN_MEMORY_BYTES = 2**30
_DIGITS_SPLITS = ("train", "test", "fit", "validation")
_DIGITS_HELD_OUT = 360
# What TFDS's imagenet2012_real calls them.
_LABELS_OF_REAL = {"label": "original_label", "labels": "real_label"}


@runtime_checkable
class Records(Protocol):
    """Random access to records `{"image": bytes, "label": int}`, with or without `"file_name"`."""

    def __len__(self) -> int:
        """The number of records."""

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Record `index`, counted from 0."""


@dataclass(frozen=True)
class InMemory:
    """A split whose images are decoded and of one size.

    Attributes:
      images: uint8 (n, height, width, channels).
      labels: int32 (n,), indices into `class_names`.
      class_names: the names of the classes in the order of their labels.
    """

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """3 for colour, 1 for luminance."""
        return self.images.shape[-1]


@dataclass(frozen=True)
class Encoded:
    """A split whose images are read and decoded when they are asked for.

    Attributes:
      records: the examples in the order of the data set; picklable if worker processes read it.
      class_names: the names of the classes in the order of their labels.
      channels: 3 for colour, 1 for luminance.
      multi_label: whether a record has, beside `label`, any number of right classes in `labels`.
      exif: whether images are turned upright by their EXIF orientation, as photographs are.
    """

    records: Records
    class_names: tuple[str, ...]
    channels: int
    multi_label: bool = False
    exif: bool = False

    def __len__(self) -> int:
        """The number of examples."""
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


Split = InMemory | Encoded


def load_split(
    name: str, split: str, *, image_size: tuple[int, int], data_dir: str | None = None
) -> Split:
    """Opens one split of a data set, in the order in which the data set holds it.

    A TFDS data set is read without TensorFlow, so it must be prepared as array_record. It is
    decoded into memory if its features fix the size of its images at `image_size` and the split
    fits in 1 GiB. The records of `imagenet2012_real` have the original label as `label` and the
    ReaL labels, which may be none, as `labels`.

    Args:
      name: `"digits"` (scikit-learn's, 8 by 8), `"synthetic"` or `"synthetic/jpeg"` (for measuring speed, as
        in `load_synthetic`), or a TFDS name such as `"imagenet2012"` or
        `"imagenet_resized/64x64"`, or a folder of images as in `load_folder`. What starts with `/`,
        `.` or `~` is a folder.
      split: a TFDS split or a part of one, such as `"train[90%:]"`; for digits `"train"` or
        `"test"`, or `"fit"` or `"validation"`, into which the training examples are divided for
        choosing settings; for a folder see `load_folder`.
      image_size: height and width in pixels of the images that will be asked for.
      data_dir: the folder of the TFDS data sets; by default `$TFDS_DATA_DIR` or
        `~/tensorflow_datasets`.

    Returns:
      `InMemory` or `Encoded`.

    Raises:
      UserError: the data set or split is unknown, not prepared, not prepared as array_record,
        damaged or not of labelled images; or a package is missing.
    """
    if name == "digits":
        return _load_digits(split, image_size)
    if _is_synthetic(name):
        from cait_jax.data.synthetic import load_synthetic

        return load_synthetic(name, split, image_size, IN_MEMORY_BYTES)
    if is_folder(name):
        from cait_jax.data.folder import load_folder

        return load_folder(name, split)
    return _load_tfds(name, split, image_size, data_dir)


def split_names(name: str, *, data_dir: str | None = None) -> tuple[str, ...]:
    """Names the splits of a data set.

    Args:
      name: as for `load_split`.
      data_dir: as for `load_split`.

    Raises:
      UserError: the data set is unknown, not prepared, not prepared as array_record or damaged.
    """
    if name == "digits":
        return _DIGITS_SPLITS
    if _is_synthetic(name):
        from cait_jax.data.synthetic import SPLITS

        return SPLITS
    if is_folder(name):
        from cait_jax.data.folder import folder_splits

        return folder_splits(name)
    from cait_jax.data.prepared import prepared_builder

    return tuple(prepared_builder(name, data_dir).info.splits)


def read_record(split: Encoded, index: int) -> Mapping[str, Any]:
    """Reads record `index` of a split.

    Raises:
      BrokenImage: it cannot be read, or is empty; it is named.
    """
    from cait_jax.data.decode import BrokenImage

    try:
        record = split.records[index]
    except MemoryError:
        raise
    except UserError as error:  # which names what it is about
        raise BrokenImage(str(error)) from error
    except Exception as error:  # array_record and the feature decoders raise any type
        raise BrokenImage(f"image {index} cannot be read: {first_line(error)}") from error
    if not isinstance(record["image"], bytes):  # as in a file that was cut short
        raise BrokenImage(f"image {index} cannot be read: its record is empty")
    return record


def record_name(index: int, record: Mapping[str, Any]) -> str:
    """What messages call a record: its place in the split and its file, where that is known."""
    name = record.get("file_name", b"")
    name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return f"image {index} ({name})" if name else f"image {index}"


def is_made_here(name: str) -> bool:
    """Whether `name` stands for images that need no files: the digits, or synthetic ones."""
    return name == "digits" or _is_synthetic(name)


def _is_synthetic(name: str) -> bool:
    return name.split("/")[0] == "synthetic"


def is_folder(name: str) -> bool:
    """Whether `name` is a path to a folder of images, and not a TFDS name, whatever lies here under it."""
    if name.startswith((os.sep, ".", "~")):
        return True
    if not Path(name).is_dir():
        return False
    import tensorflow_datasets as tfds

    base, *_ = name.replace(":", "/").split("/")
    return base not in tfds.list_builders(with_community_datasets=False)


def _load_digits(split: str, image_size: tuple[int, int]) -> InMemory:
    if image_size != (8, 8):
        raise UserError(
            f"the digits are 8 by 8 pixels, so the image size must be 8, not {_by(image_size)}"
        )
    if split not in _DIGITS_SPLITS:
        raise UserError(f"digits has no split {split!r}; {nearest(split, _DIGITS_SPLITS)}")
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError(
            'the digits come with scikit-learn: pip install "cait-jax[digits]"'
        ) from error

    digits = load_digits()

    def divide(indices: np.ndarray, seed: int) -> list[np.ndarray]:
        return train_test_split(
            indices,
            test_size=_DIGITS_HELD_OUT,
            stratify=digits.target[indices],
            random_state=seed,
        )

    indices = {}
    indices["train"], indices["test"] = divide(np.arange(len(digits.target)), seed=0)
    indices["fit"], indices["validation"] = divide(indices["train"], seed=1)
    chosen = indices[split]
    return InMemory(
        images=np.round(digits.images[chosen, ..., None] * (255 / 16)).astype(np.uint8),
        labels=digits.target[chosen].astype(np.int32),
        class_names=tuple(str(digit) for digit in digits.target_names),
    )


def _load_tfds(name: str, split: str, image_size: tuple[int, int], data_dir: str | None) -> Split:
    import tensorflow_datasets as tfds

    from cait_jax.data.prepared import damaged, prepared_builder

    builder = prepared_builder(name, data_dir)
    features = dict(builder.info.features.items())
    multi_label = set(_LABELS_OF_REAL.values()) <= features.keys()
    image = features.get("image")
    label = features.get(_LABELS_OF_REAL["label"] if multi_label else "label")
    if not isinstance(image, tfds.features.Image) or not isinstance(
        label, tfds.features.ClassLabel
    ):
        raise UserError(
            f"data set {name} does not pair an 'image' with a class 'label'; "
            f"its features are {', '.join(features)}"
        )
    _check_split(builder, name, split)
    try:
        records = builder.as_data_source(split, decoders={"image": tfds.decode.SkipDecoding()})
        if multi_label:
            records = _Renamed(records, _LABELS_OF_REAL)
        first = records[0]
        if first["image"] is None or first["label"] is None:  # as in a file that was cut short
            raise ValueError("its first record is empty")
    except Exception as error:  # array_record and the feature decoders raise any type
        raise damaged(name, builder.data_path, error) from error
    if first["label"] < 0:
        raise UserError(f"split {split!r} of data set {name} has no labels; choose another split")

    class_names = tuple(label.names)
    *size, depth = image.shape
    channels = 1 if depth == 1 else 3
    fits = len(records) * image_size[0] * image_size[1] * channels <= IN_MEMORY_BYTES
    if tuple(size) != image_size or not fits or multi_label:
        return Encoded(records, class_names, channels, multi_label=multi_label)
    try:
        images, labels = _decode_all(records, image_size, channels, f"decoding {name} {split}")
    except Exception as error:
        raise damaged(name, builder.data_path, error) from error
    return InMemory(images, labels, class_names)


@dataclass(frozen=True)
class _Renamed:
    """Records whose features get the names that `names` maps to theirs."""

    records: Any
    names: Mapping[str, str]

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Mapping[str, Any]:
        return self._renamed(self.records[index])

    def __getitems__(self, indices: Sequence[int]) -> list[Mapping[str, Any]]:
        return [self._renamed(record) for record in self.records.__getitems__(indices)]

    def _renamed(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        return {**record, **{name: record[theirs] for name, theirs in self.names.items()}}


def _check_split(builder: "tfds.core.DatasetBuilder", name: str, split: str) -> None:
    splits = builder.info.splits
    known = ", ".join(f"{key} ({info.num_examples} examples)" for key, info in splits.items())
    try:
        count = splits[split].num_examples
    except (ValueError, KeyError) as error:
        raise UserError(
            f"split {split!r} of data set {name} cannot be read: {first_line(error)}; "
            f"the splits are {known}, and a part is written like 'train[:90%]'"
        ) from error
    if not count:
        raise UserError(f"split {split!r} of data set {name} is empty; the splits are {known}")


def first_line(error: BaseException) -> str:
    """What an error of another library says, as part of a sentence."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".:;")


def _decode_all(
    records: Any, image_size: tuple[int, int], channels: int, title: str
) -> tuple[UInt8[np.ndarray, "n h w c"], Int32[np.ndarray, "n"]]:
    from tqdm import tqdm

    from cait_jax.data.decode import BrokenImage, decode_image

    images = np.empty((len(records), *image_size, channels), np.uint8)
    labels = np.empty(len(records), np.int32)

    def decode(indices: range) -> int:
        # By the chunk: array_record takes longer to read one record than to decode a small image.
        for index, record in zip(indices, records.__getitems__(list(indices)), strict=True):
            try:
                images[index] = decode_image(record["image"], channels=channels)
            except BrokenImage as error:
                raise BrokenImage(
                    f"{record_name(index, record)} cannot be decoded: {error}"
                ) from error
            labels[index] = record["label"]
        return len(indices)

    with (
        ThreadPoolExecutor() as pool,
        tqdm(total=len(records), desc=title, unit="image", disable=None, leave=False) as bar,
    ):
        for count in pool.map(decode, _chunks(len(records))):
            bar.update(count)
    return images, labels


def _chunks(count: int, size: int = 512) -> Iterator[range]:
    for start in range(0, count, size):
        yield range(start, min(start + size, count))


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]} by {size[1]}"
