"""A TFDS data set in TFRecord files gets array_record files beside them, without TensorFlow."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cait_jax.data.sources import first_line
from cait_jax.errors import UserError

_FORMATS = "alternativeFileFormats"


@dataclass(frozen=True)
class Shard:
    """One file of a data set.

    Attributes:
      source: the TFRecord file.
      target: the array_record file.
      records: how many records it holds.
    """

    source: Path
    target: Path
    records: int

    def is_converted(self) -> bool:
        """Whether the array_record file is there and whole."""
        from array_record.python.array_record_module import ArrayRecordReader

        if not self.target.exists():
            return False
        try:
            reader = ArrayRecordReader(str(self.target))
            count = reader.num_records()
            reader.close()
        except Exception:  # array_record reports damage in any type
            return False
        return count == self.records


@dataclass(frozen=True)
class Conversion:
    """What there is to convert.

    Attributes:
      folder: the folder of the data set.
      shards: its files.
    """

    folder: Path
    shards: tuple[Shard, ...]

    @property
    def records(self) -> int:
        """How many records the data set holds."""
        return sum(shard.records for shard in self.shards)


def plan_conversion(directory: str | Path) -> Conversion:
    """Finds the TFRecord files of a data set.

    Args:
      directory: the folder that holds `dataset_info.json`, or one above it that holds only one such folder.

    Raises:
      UserError: there is no data set, or more than one, or a damaged one, or a file of it is missing.
    """
    import tensorflow_datasets as tfds

    folder = _data_set_folder(Path(directory).expanduser())
    try:
        info = tfds.builder_from_directory(folder).info
        templates = {name: split.filename_template for name, split in info.splits.items()}
        shards = tuple(
            Shard(Path(source), Path(target), records)
            for name, split in info.splits.items()
            for source, target, records in zip(
                templates[name]
                .replace(filetype_suffix="tfrecord")
                .sharded_filepaths(split.num_shards),
                templates[name]
                .replace(filetype_suffix="array_record")
                .sharded_filepaths(split.num_shards),
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


def convert(plan: Conversion, progress: Callable[[int], None] | None = None) -> int:
    """Writes the array_record files that are not there yet, and adds the format to the data set.

    Each file gets its name when it is whole and on the disk, so a conversion that was stopped goes on with
    the file it was in. The data set can be read as TFRecord as before.

    Args:
      plan: what to convert.
      progress: called with the number of records done since its last call.

    Returns:
      How many files were written.

    Raises:
      UserError: the disk is too small, or a TFRecord file is damaged or holds another number of records than
        the data set says.
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
    from cait_jax.data.image_files import nearest_path

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

    from cait_jax.data.tfrecord import read_tfrecord

    partial = shard.target.with_name(f".{shard.target.name}.partial")
    try:
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
        _sync(partial)
        partial.replace(shard.target)
        _sync(shard.target.parent)
    finally:
        partial.unlink(missing_ok=True)


def _add_format(path: Path) -> None:
    """Adds array_record to the formats that the data set says it has."""
    description = json.loads(path.read_text())
    formats = description.get(_FORMATS, [])
    if "array_record" in (description.get("fileFormat"), *formats):
        return
    description[_FORMATS] = [*formats, "array_record"]
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(description, indent=2))
    _sync(partial)
    partial.replace(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Waits until a file or directory is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
