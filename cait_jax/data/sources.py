"""Names of data sets to splits, and the reading of TFDS data sets, which needs no TensorFlow."""

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cait_jax.data.split import Encoded, Split, first_line
from cait_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

IN_MEMORY_BYTES = 2**30
_GENERATED = ("digits", "synthetic", "synthetic/jpeg")
# What TFDS's imagenet2012_real calls them.
_LABELS_OF_REAL = {"label": "original_label", "labels": "real_label"}


def load_split(
    name: str, split: str, *, image_size: tuple[int, int], data_dir: str | None = None
) -> Split:
    """Opens one split of a data set, in the order in which the data set holds it.

    A TFDS data set must be prepared as array_record. It is decoded into memory if its features fix the size of its
    images at `image_size` and the split fits in 1 GiB. The records of `imagenet2012_real` have the original label
    as `label` and the ReaL labels, which may be none, as `labels`.

    Args:
      name: `"digits"`, `"synthetic"` or `"synthetic/jpeg"` (see `cait_jax.data.in_memory`), a TFDS name such as
        `"imagenet2012"` or `"imagenet_resized/64x64"`, or a folder of images as for `load_folder`. What starts
        with `/`, `.` or `~` is a folder.
      split: a TFDS split or a part of one, such as `"train[90%:]"`; otherwise see the functions that load it.
      image_size: height and width in pixels of the images that will be asked for.
      data_dir: the folder of the TFDS data sets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      UserError: the data set or split is unknown, not prepared, not prepared as array_record, damaged or not of
        labelled images; or a package is missing.
    """
    if is_generated(name):
        from cait_jax.data.in_memory import load_digits, load_synthetic

        if name == "digits":
            return load_digits(split, image_size)
        return load_synthetic(name, split, image_size, IN_MEMORY_BYTES)
    if is_folder(name):
        from cait_jax.data.folder import load_folder

        return load_folder(name, split)
    return _load_tfds(name, split, image_size, data_dir)


def split_names(name: str, *, data_dir: str | None = None) -> tuple[str, ...]:
    """The splits of a data set; arguments and errors as for `load_split`."""
    if is_generated(name):
        from cait_jax.data.in_memory import DIGITS_SPLITS, SPLITS

        return DIGITS_SPLITS if name == "digits" else SPLITS
    if is_folder(name):
        from cait_jax.data.folder import folder_splits

        return folder_splits(name)
    return tuple(prepared_builder(name, data_dir).info.splits)


def is_generated(name: str) -> bool:
    """Whether `name` means images that need no files: the digits, or synthetic ones."""
    return name == "digits" or name.split("/")[0] == "synthetic"


def is_folder(name: str) -> bool:
    """Whether `name` is a path to a folder of images, and not a TFDS name, even if a folder here has that name."""
    if name.startswith((os.sep, ".", "~")):
        return True
    if not Path(name).is_dir():
        return False
    import tensorflow_datasets as tfds

    base, *_ = name.replace(":", "/").split("/")
    return base not in tfds.list_builders(with_community_datasets=False)


def find_builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """The TFDS builder of a data set, prepared or not.

    Raises:
      UserError: the name is unknown or cannot be opened, or one of the two is an address such as `gs://...`.
    """
    # TFDS would ask for a package that does not help, or raise a KeyError.
    for given in (name, os.environ.get("TFDS_DATA_DIR", "") if data_dir is None else data_dir):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
            raise UserError(
                f"{given} is an address, and data sets are read from folders: mount the bucket (gs:// with "
                "gcsfuse) and give the folder where it is mounted, or copy the data to a disk"
            )
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = str(tfds.core.Path(data_dir).expanduser())
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        # Without TensorFlow the community's data sets cannot be listed.
        names = [*_GENERATED, *tfds.list_builders(with_community_datasets=False)]
        near = nearest(name, names, count=6)
        if not near.startswith("nearest"):
            near = "the known ones are at tensorflow.org/datasets/catalog"
        raise UserError(f"there is no folder and no data set called {name!r}; {near}") from error
    except Exception as error:  # a wrong version or config, an unreadable folder
        raise UserError(
            f"data set {name!r} cannot be opened: {first_line(error.__cause__ or error)}; check "
            "its name, configuration and version, and if its folder is damaged, copy or prepare it "
            "again"
        ) from error


def prepared_builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """The TFDS builder of a data set that is prepared as array_record.

    Raises:
      UserError: the data set is unknown, not prepared, not as array_record, or damaged.
    """
    builder = find_builder(name, data_dir)
    if not is_prepared(builder):
        how = how_to_prepare(builder, name)
        raise UserError(f"data set {name} is not prepared in {builder.data_path}; {how}")
    return open_array_record(Path(builder.data_path), name)


def is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    """Whether the folder describes a data set. TFDS's own `is_prepared` would print warnings."""
    files = ("dataset_info.json", "features.json")
    return all((builder.data_path / file).exists() for file in files)


def open_array_record(folder: Path, name: str) -> "tfds.core.DatasetBuilder":
    """The TFDS builder of the data set in the folder that holds `dataset_info.json`.

    Raises:
      UserError: the data set is not prepared as array_record, or damaged.
    """
    import tensorflow_datasets as tfds

    try:
        prepared = tfds.builder_from_directory(folder)
        formats = prepared.info.available_file_formats()
    except Exception as error:
        raise _damaged(name, folder, error) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(file_format.value for file_format in formats)) or "no known format"
        raise UserError(
            f"data set {name} in {folder} is prepared as {found}, which cannot be read by index; "
            f"run: {shlex.join(['cait', 'data', 'convert', str(folder)])}"
        )
    return prepared


def how_to_prepare(builder: "tfds.core.DatasetBuilder", name: str) -> str:
    """The commands that prepare a data set, and where its archives belong."""
    first, data_dir = "", _data_dir(builder)
    if builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        archives = "its archives"
        if builder.name == "imagenet2012":
            archives = "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"
        first = f"put {archives} into {manual_folder(builder)} and then "
    ours = shlex.join(["cait", "data", "prepare", name, f"--data-dir={data_dir}"])
    theirs = shlex.join(
        ["tfds", "build", name, "--file_format=array_record", f"--data_dir={data_dir}"]
    )
    return (
        f'{first}run: {ours} (or {theirs}; both need TensorFlow: pip install "cait-jax[prepare]")'
    )


def manual_folder(builder: "tfds.core.DatasetBuilder") -> Path:
    """Where archives that must be downloaded by hand belong."""
    return _data_dir(builder) / "downloads" / "manual"


def _data_dir(builder: "tfds.core.DatasetBuilder") -> Path:
    return Path(builder.data_path).parents[1 if builder.builder_config is None else 2]


def _damaged(name: str, folder: object, error: Exception) -> UserError:
    return UserError(
        f"data set {name} in {folder} cannot be read and seems damaged ({first_line(error)}); "
        "copy or prepare it again"
    )


def _load_tfds(name: str, split: str, image_size: tuple[int, int], data_dir: str | None) -> Split:
    import tensorflow_datasets as tfds

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
        if first["image"] is None or first["label"] is None:  # as in a truncated file
            raise ValueError("its first record is empty")
    except Exception as error:  # array_record and the feature decoders raise any type
        raise _damaged(name, builder.data_path, error) from error
    if first["label"] < 0:
        raise UserError(f"split {split!r} of data set {name} has no labels; choose another split")

    *size, depth = image.shape
    encoded = Encoded(records, tuple(label.names), 1 if depth == 1 else 3, multi_label=multi_label)
    fits = len(records) * image_size[0] * image_size[1] * encoded.channels <= IN_MEMORY_BYTES
    if tuple(size) != image_size or not fits or multi_label:
        return encoded
    from cait_jax.data.in_memory import decoded

    try:
        return decoded(encoded, image_size, title=f"decoding {name} {split}")
    except Exception as error:
        raise _damaged(name, builder.data_path, error) from error


@dataclass(frozen=True)
class _Renamed:
    """Records with some features under other names: `names` maps new to old."""

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
