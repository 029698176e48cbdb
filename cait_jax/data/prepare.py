"""TFDS data sets as array_record: prepared by TFDS, or converted from tfrecord without TensorFlow.

A record of tfrecord is its length (uint64), the masked CRC-32C of those 8 bytes (uint32), the data, and the masked
CRC-32C of the data, all little-endian (tensorflow/core/lib/io/record_writer.h).
"""

import contextlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cait_jax.data.image_files import nearest_path
from cait_jax.data.sources import (
    find_builder,
    how_to_prepare,
    is_prepared,
    manual_folder,
    open_array_record,
)
from cait_jax.data.split import first_line
from cait_jax.errors import UserError
from cait_jax.files import atomic_replace

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_FORMATS = "alternativeFileFormats"
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")
_MASK_DELTA = 0xA282EAD8


@dataclass(frozen=True)
class Preparation:
    """What preparing a data set takes.

    Attributes:
      folder: of the data set.
      prepared: whether it is there as array_record already.
      download_bytes: None if TFDS does not know.
      data_bytes: size of the data set on disk; None if TFDS does not know.
      free_bytes: on that disk.
      manual: where archives must be put manually first; None if there are none.
    """

    folder: Path
    prepared: bool
    download_bytes: int | None
    data_bytes: int | None
    free_bytes: int
    manual: Path | None


def plan_preparation(name: str, data_dir: str | None) -> Preparation:
    """What `prepare` with the same arguments would do.

    Raises:
      UserError: the data set is unknown; or it is there, but not as array_record.
    """
    builder = find_builder(name, data_dir)
    folder = Path(builder.data_path)
    prepared = is_prepared(builder)
    if prepared:
        open_array_record(folder, name)
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return Preparation(
        folder=folder,
        prepared=prepared,
        download_bytes=int(builder.info.download_size) or None,
        data_bytes=int(builder.info.dataset_size) or None,
        free_bytes=shutil.disk_usage(existing).free,
        manual=manual_folder(builder) if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None,
    )


def prepare(name: str, data_dir: str | None) -> Path:
    """Downloads a data set and writes it as array_record, by TFDS and TensorFlow; returns its folder.

    Raises:
      UserError: as from `plan_preparation`; TensorFlow is missing, the disk is too small, archives have
        to be put in their place first, or TFDS failed.
    """
    plan = plan_preparation(name, data_dir)
    if plan.prepared:
        return plan.folder
    if plan.data_bytes is not None and plan.free_bytes < plan.data_bytes:
        raise UserError(
            f"{name} takes {plan.data_bytes / 1e9:.1f} GB and {plan.folder} has {plan.free_bytes / 1e9:.1f} "
            "GB free: make room, or name another folder by --data-dir"
        )
    builder = find_builder(name, data_dir)
    if plan.manual is not None and not any(plan.manual.glob("[!.]*")):
        raise UserError(
            f"{name} cannot be downloaded by a program: {how_to_prepare(builder, name)}"
        )
    try:
        import tensorflow  # noqa: F401
    except ImportError as error:
        raise UserError(
            'preparing a data set needs TensorFlow: pip install "cait-jax[prepare]"'
        ) from error
    try:
        with contextlib.redirect_stdout(sys.stderr):  # where TFDS prints sentences of its own
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:  # of network, archives or disk; TFDS removes what is half done
        raise UserError(f"TFDS could not prepare {name}: {first_line(error)}") from error
    open_array_record(plan.folder, name)
    return plan.folder


@dataclass(frozen=True)
class Shard:
    """One file of a data set: its tfrecord `source`, its array_record `target`, and the number of records."""

    source: Path
    target: Path
    records: int

    def is_converted(self) -> bool:
        """Whether the array_record file exists and is whole."""
        from array_record.python.array_record_module import ArrayRecordReader

        if not self.target.exists():
            return False
        try:
            reader = ArrayRecordReader(str(self.target))
            count: int = reader.num_records()
            reader.close()
        except Exception:  # array_record reports damage in any type
            return False
        return count == self.records


@dataclass(frozen=True)
class Conversion:
    """The files of the data set in a folder."""

    folder: Path
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """The number of records of the data set."""
        return sum(shard.records for shard in self.shards)


def plan_conversion(directory: str | Path) -> Conversion:
    """Finds the tfrecord files of the data set in a directory, or of the only one below it.

    Raises:
      UserError: there is no data set, or more than one, or a damaged one, or a file of it is missing.
    """
    import tensorflow_datasets as tfds

    folder = _data_set_folder(Path(directory).expanduser())
    try:
        info = tfds.builder_from_directory(folder).info
        shards = tuple(
            Shard(Path(source), Path(target), records)
            for split in info.splits.values()
            for source, target, records in zip(
                shard_paths(split, "tfrecord"),
                shard_paths(split, "array_record"),
                split.shard_lengths,
                strict=True,
            )
        )
    except Exception as error:  # TFDS reports damage in any type
        raise UserError(
            f"the data set in {folder} cannot be read ({first_line(error)}): copy it again"
        ) from error
    missing = [s for s in shards if not s.source.exists() and not s.is_converted()]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(shards)} files of the data set in {folder} are missing, such as "
            f"{missing[0].source.name}: copy it again"
        )
    return Conversion(folder, shards)


def shard_paths(split: "tfds.core.SplitInfo", file_format: str) -> list[os.PathLike[str]]:
    """The files of a split in a format such as `"array_record"`."""
    template = split.filename_template.replace(filetype_suffix=file_format)
    paths: list[os.PathLike[str]] = template.sharded_filepaths(split.num_shards)
    return paths


def convert(plan: Conversion, progress: Callable[[int], None] | None = None) -> int:
    """Writes the array_record files that do not exist yet, and adds the format to the data set.

    Files appear when they are whole and synced, so a conversion that was stopped continues with the file it was
    in. The data set can be read as tfrecord as before.

    Args:
      progress: called with the number of records done since its last call.

    Returns:
      How many files were written.

    Raises:
      UserError: the disk is too small, or a tfrecord file is damaged or has another number of records than
        the data set states.
    """
    progress = progress or (lambda records: None)
    left = []
    for shard in plan.shards:
        if shard.is_converted():
            progress(shard.records)
        else:
            left.append(shard)
    needed = sum(shard.source.stat().st_size for shard in left)
    free = shutil.disk_usage(plan.folder).free
    if needed > free:
        raise UserError(
            f"the array_record files take {needed / 1e9:.1f} GB and {plan.folder} has {free / 1e9:.1f} GB "
            "free: make room"
        )
    for shard in left:
        _convert_shard(shard, progress)
    _add_format(plan.folder / "dataset_info.json")
    return len(left)


def _data_set_folder(directory: Path) -> Path:
    if not directory.is_dir():
        raise UserError(f"there is no folder {directory}{nearest_path(directory)}")
    found = [
        path.parent
        for pattern in ("", "*/", "*/*/", "*/*/*/")
        for path in sorted(directory.glob(f"{pattern}dataset_info.json"))
    ]
    if not found:
        raise UserError(
            f"{directory} holds no TFDS data set: name the folder of its version, such as "
            f"{directory / 'imagenet2012' / '5.1.0'}"
        )
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found[:4])
        raise UserError(f"{directory} holds several data sets: name one of {names}")
    return found[0]


def _convert_shard(shard: Shard, progress: Callable[[int], None]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    with atomic_replace(shard.target) as partial:
        # Records are read one by one in any order, so each is a group of its own.
        writer = ArrayRecordWriter(str(partial), "group_size:1")
        count = 0
        try:
            for record in read_tfrecord(shard.source):
                writer.write(record)
                count += 1
                progress(1)
        finally:
            writer.close()
        written = Shard(shard.source, partial, shard.records)
        if count != shard.records or not written.is_converted():
            raise UserError(
                f"{shard.source} holds {count} records and the data set says {shard.records}: copy the file "
                "again"
            )


def _add_format(path: Path) -> None:
    """Adds array_record to the formats that the data set lists."""
    description = json.loads(path.read_text())
    formats = description.get(_FORMATS, [])
    if "array_record" in (description.get("fileFormat"), *formats):
        return
    description[_FORMATS] = [*formats, "array_record"]
    with atomic_replace(path) as partial:
        partial.write_text(json.dumps(description, indent=2))


def read_tfrecord(path: Path) -> Iterator[bytes]:
    """The records of an uncompressed tfrecord file, each checked by its checksums.

    Raises:
      UserError: while iterating, if the file is truncated or damaged, or is none.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        number = 0
        while header := file.read(_HEADER.size):
            yield _record(file, header, size, f"record {number} of {path}")
            number += 1


def masked_crc(data: bytes) -> int:
    """The CRC-32C of `data`, rotated right by 15 bits and shifted by a constant, as tfrecord stores it."""
    import google_crc32c

    crc: int = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + _MASK_DELTA) & 0xFFFFFFFF


def _record(file: BinaryIO, header: bytes, size: int, which: str) -> bytes:
    if len(header) < _HEADER.size:
        raise _cut_short(which)
    length, of_length = _HEADER.unpack(header)
    if masked_crc(header[:8]) != of_length:
        raise UserError(
            f"{which} is damaged (the checksum of its length is wrong): copy the file again"
        )
    if file.tell() + length + _FOOTER.size > size:
        raise _cut_short(which)
    data = file.read(length)
    (of_data,) = _FOOTER.unpack(file.read(_FOOTER.size))
    if masked_crc(data) != of_data:
        raise UserError(
            f"{which} is damaged (the checksum of its data is wrong): copy the file again"
        )
    return data


def _cut_short(which: str) -> UserError:
    return UserError(f"{which} is cut short: copy the file again")
