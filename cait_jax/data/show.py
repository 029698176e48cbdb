"""What a data set holds: counts, sizes, classes, and a picture of some of its images."""

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cait_jax.data.sources import (
    Encoded,
    InMemory,
    Split,
    is_folder,
    load_split,
    read_record,
    record_name,
    split_names,
)
from cait_jax.errors import UserError, printable

_DECODED = 100
_TILE = 128
_CAPTION = 16
# No image has one row, so that TFDS data sets stay encoded and are not decoded as a whole.
_ENCODED = (1, 1)


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds.

    Attributes:
      name: the split.
      images: how many images.
      bytes: what its files take; None if it has none.
      broken: how many of those tried cannot be read or decoded.
      decoded: how many images, evenly spread, were tried.
      width: least, median and greatest width in pixels of those.
      height: likewise.
      left_out: of a folder, how many files are not read, by suffix.
      broken_images: the names of those that are broken.
    """

    name: str
    images: int
    bytes: int | None
    broken: int
    decoded: int
    width: tuple[int, int, int]
    height: tuple[int, int, int]
    left_out: dict[str, int] = field(default_factory=dict)
    broken_images: tuple[str, ...] = ()


def open_split(name: str, split: str, data_dir: str | None = None) -> Split:
    """Opens a split as `load_split` does, encoded where it can be.

    Args:
      name: as in `load_split`.
      split: likewise.
      data_dir: likewise.

    Raises:
      UserError: as from `load_split`.
    """
    fixed = {"digits": (8, 8), "synthetic": (224, 224)}
    return load_split(name, split, image_size=fixed.get(name, _ENCODED), data_dir=data_dir)


def summarize(name: str, split_name: str, split: Split, data_dir: str | None) -> SplitSummary:
    """Counts a split, and decodes up to 100 of its images.

    Args:
      name: the data set, as in `load_split`.
      split_name: which split, or which part of one.
      split: that, opened.
      data_dir: as in `load_split`.
    """
    if isinstance(split, InMemory):
        height, width = split.images.shape[1:3]
        return SplitSummary(
            split_name, len(split), None, 0, len(split), (width,) * 3, (height,) * 3
        )
    from cait_jax.data.decode import BrokenImage, decode_image

    sizes, broken = [], []
    chosen = spread(len(split), _DECODED)
    for index in chosen:
        record = read_record(split, index)
        try:
            sizes.append(decode_image(record["image"]).shape[:2])
        except BrokenImage:
            broken.append(record_name(index, record))
    heights, widths = zip(*sizes, strict=True) if sizes else ((0,), (0,))
    return SplitSummary(
        split_name,
        len(split),
        _bytes_of(name, split_name, split, data_dir),
        len(broken),
        len(chosen),
        _spread_of(widths),
        _spread_of(heights),
        dict(_left_out(split)),
        tuple(broken),
    )


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers below `count`, evenly spread from the first to the last."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / max(1, most - 1)) for i in range(most)]


def write_sheet(
    path: Path, split: Split, class_words: Sequence[str], *, images: int, columns: int = 8
) -> list[int]:
    """Writes a contact sheet: images evenly spread over a split, each over the name of its class.

    Args:
      path: the PNG to write.
      split: what to show.
      class_words: what to call each class.
      images: how many images at most.
      columns: how many stand side by side.

    Returns:
      The indices of images that cannot be read or decoded, whose places stay grey.

    Raises:
      UserError: the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    from cait_jax.data.decode import BrokenImage

    chosen = spread(len(split), images)
    columns = min(columns, len(chosen))
    rows = -(-len(chosen) // columns)
    sheet = Image.new("RGB", (columns * _TILE, rows * (_TILE + _CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    broken = []
    for place, index in enumerate(chosen):
        left, top = place % columns * _TILE, place // columns * (_TILE + _CAPTION)
        try:
            tile, label = _tile(split, index)
        except BrokenImage:
            broken.append(index)
            tile, label = Image.new("RGB", (_TILE, _TILE), "lightgray"), None
        sheet.paste(tile, (left, top))
        words = f"{index}: broken" if label is None else printable(class_words[label])
        while draw.textlength(words, font) > _TILE - 4:
            words = words[:-2] + "…"
        draw.text((left + 2, top + _TILE), words, "black", font)
    try:
        sheet.save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return broken


def _tile(split: Split, index: int) -> tuple[Any, int]:
    from PIL import Image

    from cait_jax.data.decode import center_crop

    if isinstance(split, InMemory):
        pixels = split.images[index]
        image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        resample = Image.Resampling.NEAREST if image.width < _TILE else Image.Resampling.BICUBIC
        return image.resize((_TILE, _TILE), resample), int(split.labels[index])
    record = read_record(split, index)
    crop = center_crop(record["image"], image_size=(_TILE, _TILE), exif=split.exif)
    return Image.fromarray(crop), int(np.asarray(record["label"]))


def _left_out(split: Encoded) -> Mapping[str, int]:
    from cait_jax.data.folder import FolderRecords

    return split.records.left_out if isinstance(split.records, FolderRecords) else {}


def _spread_of(values: Sequence[int]) -> tuple[int, int, int]:
    return min(values), round(statistics.median(values)), max(values)


def _bytes_of(name: str, split_name: str, split: Encoded, data_dir: str | None) -> int | None:
    from cait_jax.data.folder import FolderRecords

    if isinstance(split.records, FolderRecords):
        root = os.fspath(split.records.root)
        return sum(os.stat(f"{root}/{file}").st_size for file in split.records.files)  # noqa: PTH116
    if is_folder(name) or name.startswith("synthetic"):
        return None
    from cait_jax.data.prepared import prepared_builder

    info = prepared_builder(name, data_dir).info.splits
    if split_name not in split_names(name, data_dir=data_dir):  # a part of one
        return None
    template = info[split_name].filename_template.replace(filetype_suffix="array_record")
    shards = template.sharded_filepaths(info[split_name].num_shards)
    return sum(Path(shard).stat().st_size for shard in shards)
