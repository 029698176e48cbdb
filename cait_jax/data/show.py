"""What a data set holds: counts, sizes, classes, a picture of some images, and whether all can be read."""

import functools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cait_jax.data.decode import center_crop, decode_image, read_header
from cait_jax.data.image_files import FolderRecords
from cait_jax.data.prepare import shard_paths
from cait_jax.data.sources import is_folder, load_split, prepared_builder, split_names
from cait_jax.data.split import BrokenImage, Encoded, InMemory, Split, read_record, record_name
from cait_jax.errors import UserError, printable, some
from cait_jax.reading import check_regular

_DECODED = 100
_TILE = 128
_CAPTION = 16
# No image has one row, so that TFDS data sets stay encoded and are not decoded as a whole.
_ENCODED = (1, 1)


@dataclass(frozen=True)
class SplitSummary:
    """What one split holds.

    Attributes:
      images: how many.
      bytes: size of its files; None if it has none.
      broken: how many of the decoded ones cannot be read or decoded.
      decoded: how many images, evenly spread, were decoded.
      width: least, median and greatest of the decoded ones in pixels.
      height: as `width`.
      left_out: how many files of a folder are not read, by suffix.
      broken_images: their names.
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
    """Opens a split as `load_split` does, encoded where it can be."""
    fixed = {"digits": (8, 8), "synthetic": (224, 224)}
    return load_split(name, split, image_size=fixed.get(name, _ENCODED), data_dir=data_dir)


def summarize(name: str, split_name: str, split: Split, data_dir: str | None) -> SplitSummary:
    """Counts an opened split, or a part of one, and decodes up to 100 of its images."""
    if isinstance(split, InMemory):
        height, width = split.images.shape[1:3]
        return SplitSummary(
            split_name, len(split), None, 0, len(split), (width,) * 3, (height,) * 3
        )
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
    """Writes a contact sheet as PNG: at most so many images, evenly spread over a split, with their class names.

    Returns:
      The indices of images that cannot be read or decoded, whose places stay grey.

    Raises:
      UserError: the file cannot be written.
    """
    from PIL import Image

    tiles, captions, broken = [], [], []
    for index in spread(len(split), images):
        try:
            tile, label = _tile(split, index)
            captions.append((class_words[label], "black"))
        except BrokenImage:
            broken.append(index)
            tile = Image.new("RGB", (_TILE, _TILE), "lightgray")
            captions.append((f"{index}: broken", "black"))
        tiles.append(tile)
    try:
        draw_sheet(tiles, captions, columns=columns).save(path, "PNG")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error
    return broken


def draw_sheet(
    pictures: Sequence[Any], captions: Sequence[tuple[str, str]], *, columns: int = 8
) -> Any:
    """A Pillow image of pictures of equal size in rows, each with a line of text, cut to its width, in a colour.

    Pictures are Pillow images, or arrays uint8 (h, w, c) of 1 or 3 channels. Those of a side below 128 pixels are
    enlarged to that.
    """
    from PIL import Image, ImageDraw, ImageFont

    columns = min(columns, len(pictures))
    tiles = [_enlarged(picture) for picture in pictures]
    width, height = tiles[0].size
    size = (columns * width, -(-len(tiles) // columns) * (height + _CAPTION))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(size=11)
    for place, (tile, (words, colour)) in enumerate(zip(tiles, captions, strict=True)):
        left, top = place % columns * width, place // columns * (height + _CAPTION)
        sheet.paste(tile, (left, top))
        words = printable(words)
        while draw.textlength(words, font) > width - 4:
            words = words[:-2] + "…"
        draw.text((left + 2, top + height), words, colour, font)
    return sheet


def _enlarged(picture: Any) -> Any:
    from PIL import Image

    if isinstance(picture, np.ndarray):
        picture = Image.fromarray(picture if picture.shape[-1] == 3 else picture[..., 0])
    scale = _TILE / min(picture.size)
    if scale <= 1:
        return picture
    size = [round(scale * side) for side in picture.size]
    return picture.resize(size, Image.Resampling.NEAREST)


def _tile(split: Split, index: int) -> tuple[Any, int]:
    from PIL import Image

    if isinstance(split, InMemory):
        pixels = split.images[index]
        image = Image.fromarray(pixels if pixels.shape[-1] == 3 else pixels[..., 0])
        resample = Image.Resampling.NEAREST if image.width < _TILE else Image.Resampling.BICUBIC
        return image.resize((_TILE, _TILE), resample), int(split.labels[index])
    record = read_record(split, index)
    crop = center_crop(record["image"], image_size=(_TILE, _TILE), exif=split.exif)
    return Image.fromarray(crop), int(np.asarray(record["label"]))


def _left_out(split: Encoded) -> Mapping[str, int]:
    return split.records.left_out if isinstance(split.records, FolderRecords) else {}


def _spread_of(values: Sequence[int]) -> tuple[int, int, int]:
    return min(values), round(statistics.median(values)), max(values)


def _bytes_of(name: str, split_name: str, split: Encoded, data_dir: str | None) -> int | None:
    if isinstance(split.records, FolderRecords):
        root = os.fspath(split.records.root)
        return sum(os.stat(f"{root}/{file}").st_size for file in split.records.files)  # noqa: PTH116
    if is_folder(name) or name.startswith("synthetic"):
        return None
    info = prepared_builder(name, data_dir).info.splits
    if split_name not in split_names(name, data_dir=data_dir):  # a part of one
        return None
    shards = shard_paths(info[split_name], "array_record")
    return sum(Path(shard).stat().st_size for shard in shards)


_HEAD_BYTES = 2**16
_SAMPLE = 64
_TOGETHER = 1024


def check_images(
    split: Split,
    *,
    decode_all_within: float = 60.0,
    may_be_broken: float = 0.0,
    progress: Callable[[int], object] = lambda images: None,
) -> int:
    """Reads the header of every image, and decodes all of them where that is quick.

    How long decoding takes is measured on a sample spread over the split, whose images are decoded in any case.
    Images in memory are not read again.

    Args:
      decode_all_within: seconds that decoding all may take.
      may_be_broken: fraction of the images: 0 in evaluation, `loader.MAX_BROKEN` in training, which replaces them.
      progress: called in this thread with the number of images read since its last call.

    Returns:
      How many images are broken.

    Raises:
      UserError: more are broken than may be; four of them are named.
    """
    if not isinstance(split, Encoded):
        return 0
    count = len(split)
    step = max(1, count // _SAMPLE)
    sample = list(range(0, count, step))[:_SAMPLE]
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        start = time.monotonic()
        errors = _errors(split, sample, _decoded, pool)
        decoding = (time.monotonic() - start) / max(len(sample), 1) * count <= decode_all_within
        rest = sorted(set(range(count)) - set(sample))
        progress(len(sample))
        for part in _parts(rest):
            errors |= _errors(split, part, _decoded if decoding else _header, pool)
            progress(len(part))
    if len(errors) > may_be_broken * count:
        first = min(errors)
        several = len(errors) > 1
        raise UserError(
            f"{len(errors)} of {count} images cannot be read: "
            f"{some([_name(split, index) for index in sorted(errors)])} "
            f"({'the first: ' * several}{errors[first]}); remove or replace {'them' if several else 'it'}"
        )
    return len(errors)


def _parts(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), _TOGETHER):
        yield indices[start : start + _TOGETHER]


def _errors(
    split: Encoded,
    indices: Sequence[int],
    read: Callable[[Encoded, int], None],
    pool: ThreadPoolExecutor,
) -> dict[int, str]:
    """What is broken, by index."""
    found = pool.map(functools.partial(_error, split, read), indices)
    return {index: error for index, error in zip(indices, found, strict=True) if error}


def _error(split: Encoded, read: Callable[[Encoded, int], None], index: int) -> str:
    try:
        read(split, index)
    except BrokenImage as error:
        return str(error)
    return ""


def _decoded(split: Encoded, index: int) -> None:
    decode_image(read_record(split, index)["image"], channels=split.channels)


def _header(split: Encoded, index: int) -> None:
    if isinstance(split.records, FolderRecords):
        path = split.records.root / split.records.files[index]
        try:
            check_regular(path)
            with path.open("rb") as file:
                read_header(file.read(_HEAD_BYTES))
            return
        except (OSError, BrokenImage):
            pass  # the header is longer, or the error comes with the whole file
    read_header(read_record(split, index)["image"])


def _name(split: Encoded, index: int) -> str:
    if isinstance(split.records, FolderRecords):
        return str(split.records.root / split.records.files[index])
    try:
        return record_name(index, read_record(split, index))
    except UserError:
        return f"image {index}"
