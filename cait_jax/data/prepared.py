"""TFDS data sets on disk: finding one that is prepared as array_record, and preparing one."""

import contextlib
import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cait_jax.data.sources import first_line
from cait_jax.errors import UserError, nearest

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

_IMAGENET_ARCHIVES = ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")
_NOT_TFDS = ("digits", "synthetic", "synthetic/jpeg")


def find_builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """The builder of a data set, prepared or not.

    Args:
      name: a TFDS name, such as `"imagenet2012"` or `"imagenet_resized/64x64"`.
      data_dir: the folder of the TFDS data sets; by default `$TFDS_DATA_DIR` or `~/tensorflow_datasets`.

    Raises:
      UserError: the name is unknown or cannot be opened, or one of the two is an address such as `gs://...`.
    """
    _check_local(name, data_dir)
    import tensorflow_datasets as tfds

    if data_dir is not None:
        data_dir = str(tfds.core.Path(data_dir).expanduser())
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        # Without TensorFlow the community's data sets cannot be listed.
        names = [*_NOT_TFDS, *tfds.list_builders(with_community_datasets=False)]
        near = nearest(name, names, count=6)
        hint = near if near.startswith("nearest") else "tfds.list_builders() names the known ones"
        raise UserError(f"there is no folder and no data set called {name!r}; {hint}") from error
    except Exception as error:  # a wrong version or config, an unreadable folder
        raise UserError(
            f"data set {name!r} cannot be opened: {first_line(error.__cause__ or error)}; check "
            "its name, configuration and version, and if its folder is damaged, copy or prepare it "
            "again"
        ) from error


def _check_local(name: str, data_dir: str | None) -> None:
    """Refuses addresses: TFDS would ask for a package that does not help, or raise a KeyError."""
    folder = os.environ.get("TFDS_DATA_DIR", "") if data_dir is None else data_dir
    for given in (name, folder):
        if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", given):
            raise UserError(
                f"{given} is an address, and data sets are read from folders: mount the bucket (gs:// with "
                "gcsfuse) and give the folder where it is mounted, or copy the data to a disk"
            )


def prepared_builder(name: str, data_dir: str | None) -> "tfds.core.DatasetBuilder":
    """A builder that reads `name` from its folder, which is known to hold array_record files.

    Args:
      name: as in `find_builder`.
      data_dir: likewise.

    Raises:
      UserError: the data set is unknown, not prepared, not as array_record, or damaged.
    """
    builder = find_builder(name, data_dir)
    if not is_prepared(builder):
        raise UserError(
            f"data set {name} is not prepared in {builder.data_path}; "
            f"{_how_to_prepare(builder, name)}"
        )
    return open_array_record(Path(builder.data_path), name)


def is_prepared(builder: "tfds.core.DatasetBuilder") -> bool:
    """Whether the folder describes a data set. TFDS's own `is_prepared` would print warnings."""
    return all(
        (builder.data_path / file).exists() for file in ("dataset_info.json", "features.json")
    )


def open_array_record(folder: Path, name: str) -> "tfds.core.DatasetBuilder":
    """A builder that reads the data set in a folder, which is known to hold array_record files.

    Args:
      folder: what holds `dataset_info.json`.
      name: what to call the data set in messages.

    Raises:
      UserError: the data set is not prepared as array_record, or damaged.
    """
    import tensorflow_datasets as tfds

    try:
        prepared = tfds.builder_from_directory(folder)
        formats = prepared.info.available_file_formats()
    except Exception as error:
        raise damaged(name, folder, error) from error
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        found = ", ".join(sorted(file_format.value for file_format in formats)) or "no known format"
        raise UserError(
            f"data set {name} in {folder} is prepared as {found}, which cannot be read by index; "
            f"run: {shlex.join(['cait', 'data', 'convert', str(folder)])}"
        )
    return prepared


def damaged(name: str, folder: object, error: Exception) -> UserError:
    """The mistake of a data set whose files cannot be read."""
    return UserError(
        f"data set {name} in {folder} cannot be read and seems damaged ({first_line(error)}); "
        "copy or prepare it again"
    )


@dataclass(frozen=True)
class Preparation:
    """What preparing a data set takes.

    Attributes:
      folder: where it comes to lie.
      prepared: whether it already lies there as array_record.
      download_bytes: what is downloaded; None if TFDS does not say.
      data_bytes: what the data set takes on disk; None if TFDS does not say.
      free_bytes: what is free on that disk.
      manual: where archives must be put by hand before; None if nothing must.
    """

    folder: Path
    prepared: bool
    download_bytes: int | None
    data_bytes: int | None
    free_bytes: int
    manual: Path | None


def plan_preparation(name: str, data_dir: str | None) -> Preparation:
    """Says what `prepare` would do.

    Args:
      name: as in `find_builder`.
      data_dir: likewise.

    Raises:
      UserError: the data set is unknown; or it is there, but not as array_record.
    """
    import shutil

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
        manual=_manual_folder(builder) if builder.MANUAL_DOWNLOAD_INSTRUCTIONS else None,
    )


def prepare(name: str, data_dir: str | None) -> Path:
    """Downloads a data set and writes it as array_record, by TFDS and TensorFlow.

    Args:
      name: as in `find_builder`.
      data_dir: likewise.

    Returns:
      The folder of the data set.

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
    if plan.manual is not None and not _holds_files(plan.manual):
        raise UserError(
            f"{name} cannot be downloaded by a program: {_how_to_prepare(builder, name)}"
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
    except (
        Exception
    ) as error:  # of the network, the archives, the disk; TFDS removes what is half done
        raise UserError(f"TFDS could not prepare {name}: {first_line(error)}") from error
    open_array_record(plan.folder, name)
    return plan.folder


def _how_to_prepare(builder: "tfds.core.DatasetBuilder", name: str) -> str:
    archives = ""
    if builder.name == "imagenet2012":
        archives = f"put {' and '.join(_IMAGENET_ARCHIVES)}"
    elif builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
        archives = "put its archives"
    if archives:
        archives = f"{archives} into {_manual_folder(builder)} and then "
    data_dir = _data_dir(builder)
    ours = shlex.join(["cait", "data", "prepare", name, f"--data-dir={data_dir}"])
    tfds = shlex.join(
        ["tfds", "build", name, "--file_format=array_record", f"--data_dir={data_dir}"]
    )
    return (
        f'{archives}run: {ours} (or {tfds}; both need TensorFlow: pip install "cait-jax[prepare]")'
    )


def _data_dir(builder: "tfds.core.DatasetBuilder") -> Path:
    return Path(builder.data_path).parents[1 if builder.builder_config is None else 2]


def _manual_folder(builder: "tfds.core.DatasetBuilder") -> Path:
    return _data_dir(builder) / "downloads" / "manual"


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and next(_files(folder), None) is not None


def _files(folder: Path) -> Iterator[str]:
    with os.scandir(folder) as entries:
        yield from (entry.name for entry in entries if not entry.name.startswith("."))
