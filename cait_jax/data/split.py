"""A split of a data set: decoded images in memory, or encoded images by index."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from cait_jax.errors import UserError


class BrokenImage(UserError):
    """An image that cannot be read or decoded."""


@dataclass(frozen=True)
class InMemory:
    """A split whose images are decoded and of one size; `class_names` are in the order of the labels."""

    images: UInt8[np.ndarray, "n h w c"]
    labels: Int32[np.ndarray, "n"]
    class_names: tuple[str, ...]
    left_out = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for luminance."""
        return int(self.images.shape[-1])


@dataclass(frozen=True)
class Encoded:
    """A split whose images are read and decoded on access.

    Attributes:
      records: the examples in the order of the data set, by index and with a length, each `{"image": bytes,
        "label": int}` with or without `"file_name"`; picklable if worker processes read them.
      class_names: in the order of the labels.
      channels: 3 for RGB, 1 for luminance.
      multi_label: whether records have any number of correct classes in `labels`, as well as a `label`.
      exif: whether the EXIF orientation is applied, as for photographs.
      left_out: of a folder: a sentence on its files that are not read.
    """

    records: Any
    class_names: tuple[str, ...]
    channels: int
    multi_label: bool = False
    exif: bool = False
    left_out: str | None = None

    def __len__(self) -> int:
        return len(self.records)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


Split = InMemory | Encoded


def identity(split: Split) -> dict[str, Any]:
    """What must not change when a run is resumed, as JSON values.

    Class names in the order of the labels, the number of examples and, where examples are files, `files_sha256`.
    """
    found: dict[str, Any] = {"class_names": list(split.class_names), "examples": len(split)}
    if isinstance(split, Encoded) and hasattr(split.records, "files_sha256"):
        found["files_sha256"] = split.records.files_sha256
    return found


def read_record(split: Encoded, index: int) -> Mapping[str, Any]:
    """Reads one record.

    Raises:
      BrokenImage: it cannot be read, or is empty; it is named.
    """
    try:
        record: Mapping[str, Any] = split.records[index]
    except MemoryError:
        raise
    except UserError as error:  # which names the file
        raise BrokenImage(str(error)) from error
    except Exception as error:  # array_record and the feature decoders raise any type
        raise BrokenImage(f"image {index} cannot be read: {first_line(error)}") from error
    if not isinstance(record["image"], bytes):  # as in a truncated file
        raise BrokenImage(f"image {index} cannot be read: its record is empty")
    return record


def record_name(index: int, record: Mapping[str, Any]) -> str:
    """What messages call a record: its index, and its file where that is known."""
    name = record.get("file_name", b"")
    name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
    return f"image {index} ({name})" if name else f"image {index}"


def first_line(error: BaseException) -> str:
    """The message of another library's error, as part of a sentence."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0].rstrip(".:;")
