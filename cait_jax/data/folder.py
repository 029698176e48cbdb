"""Folders of photographs: one folder a class, as a split; and what arguments name as images."""

import glob
import hashlib
import itertools
import os
import re
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from cait_jax.data.sources import Encoded
from cait_jax.errors import UserError, nearest, some

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
SPLITS = ("train", "val", "validation", "test")
_NAMES_COMPARED = 10_000
_UNDIVIDED = ("all",)
_SAME_SPLIT = {"val": "validation", "validation": "val"}
# Between which fractions the paths of each side of an undivided folder lie.
_DIVIDING = {"train": (0.1, 1.0), "val": (0.0, 0.1), "validation": (0.0, 0.1)}
_PART = re.compile(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?")


@dataclass(frozen=True, eq=False)
class FolderRecords:
    """Records of image files, read when they are asked for.

    Attributes:
      root: the folder that `files` are relative to.
      files: paths with forward slashes, in the order of the records.
      labels: int32 (n,).
    """

    root: Path
    files: tuple[str, ...] = field(repr=False)
    labels: Int32[np.ndarray, "n"] = field(repr=False)

    def __len__(self) -> int:
        """The number of files."""
        return len(self.files)

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """The encoded `image`, its `label` and its `file_name` relative to `root`."""
        name = self.files[index]
        try:
            image = (self.root / name).read_bytes()
        except OSError as error:
            raise UserError(
                f"image {self.root / name} cannot be read any more: {error.strerror}; put it back "
                "or open the folder again"
            ) from error
        return {"image": image, "label": int(self.labels[index]), "file_name": name}


def load_folder(root: str | Path, split: str | None = None, *, channels: int = 3) -> Encoded:
    """Opens a folder of images as a split.

    Either `root/CLASS/...` holds the images, or `root/SPLIT/CLASS/...` with SPLIT one of `SPLITS`.
    Deeper folders belong to their class. Labels follow the sorted names of the classes; where there is
    a `train` beside the split, the names of its classes, so that a label means the same in both.
    Hidden files and folders and `__MACOSX` count for nothing.

    Where the folder is not divided, `"train"` and `"val"` divide it: an image is of `"val"` if its
    `path_fraction` is below 0.1. So each image stays on its side when others come or go, and on every
    machine. A part such as `"train[:50%]"` is taken by the same number, not by the order of the classes.

    Args:
      root: the folder, where `~` is the home directory. Links to folders are followed.
      split: which split, where `"val"` and `"validation"` mean the same, or a part of one in whole
        percents. Of a folder that is not divided, `"train"`, `"val"`, or `"all"`, which None means too.
      channels: 3 for colour, 1 for luminance.

    Returns:
      The images ordered by class and path, to be turned upright by their EXIF orientation.

    Raises:
      UserError: the folder or the split does not exist, holds no classes, or a class no image; or no
        image falls in the part.
    """
    folder = _existing_folder(root)
    name, percents = _parsed(split)
    part, class_names = _part(folder, name)
    images = {name: _images_below(part / name) for name in _class_folders(part)}
    if empty := [name for name, files in images.items() if not files]:
        raise UserError(
            f"{part} has classes without an image that ends in {', '.join(IMAGE_SUFFIXES)}: "
            f"{some(empty)}; fill or remove what is empty"
        )
    files = tuple(f"{name}/{file}" for name in images for file in images[name])
    labels = np.repeat(
        np.array([class_names.index(name) for name in images], np.int32),
        [len(of_class) for of_class in images.values()],
    )
    side = name if part == folder else None
    if side in _DIVIDING or percents != (0, 100):
        chosen = _chosen(files, side, percents)
        if not chosen.any():
            raise UserError(
                f"none of the {len(files)} images of {part} falls in {split!r}: ask for a greater part, "
                "or divide the folder into folders train and val"
            )
        files = tuple(itertools.compress(files, chosen))
        labels = labels[chosen]
    return Encoded(FolderRecords(part, files, labels), class_names, channels, exif=True)


def path_fraction(path: str) -> float:
    """Where a path lies between 0 and 1, as if drawn uniformly, but always and everywhere the same.

    It is the first 8 bytes of the path's SHA-256 as a big-endian fraction; the path is taken in
    Unicode's composed form (NFC), since file systems differ in that.

    Args:
      path: relative to the folder of the classes, with forward slashes.

    Returns:
      A number in [0, 1).
    """
    composed = unicodedata.normalize("NFC", path).encode(errors="surrogateescape")
    # 53 bits are what a float holds.
    return (int.from_bytes(hashlib.sha256(composed).digest()[:8]) >> 11) / 2**53


def folder_splits(root: str | Path) -> tuple[str, ...]:
    """Names the splits that a folder of images is divided into; `"all"` if it holds the classes itself.

    `load_folder` divides the latter into `"train"` and `"val"` where it is asked to.

    Raises:
      UserError: the folder does not exist.
    """
    folder = _existing_folder(root)
    # A folder of this name with images alone is a class, such as the trains among vehicles.
    splits = [name for name in SPLITS if (folder / name).is_dir() and _class_folders(folder / name)]
    return tuple(splits) or _UNDIVIDED


def expand_images(arguments: Sequence[str | Path]) -> list[Path]:
    """Lists the images that files, folders and patterns name.

    Args:
      arguments: files, of any suffix; folders, of which all images are meant at any depth; and
        patterns such as `"*.jpg"` or `"photos/**/*.png"`, of which all images and folders are meant.
        `~` is the home directory.

    Returns:
      The paths in the order of the arguments, sorted within each, every file once.

    Raises:
      UserError: an argument names no image.
    """
    paths: dict[str, Path] = {}
    for argument in arguments:
        found = _images_of(Path(argument).expanduser())
        if not found:
            raise UserError(_why_nothing(Path(argument).expanduser()))
        for path in found:
            paths.setdefault(os.path.abspath(path), path)  # noqa: PTH100, a link is another image
    return list(paths.values())


def _images_of(argument: Path) -> list[Path]:
    if argument.is_dir():
        return [argument / name for name in _images_below(argument)]
    if argument.exists():
        return [argument]
    if not glob.has_magic(str(argument)):
        return []
    found = []
    for match in sorted(glob.glob(str(argument), recursive=True)):  # noqa: PTH207, absolute ones too
        path = Path(match)
        if path.is_dir():
            found += [path / name for name in _images_below(path)]
        elif _is_image(path.name):
            found.append(path)
    return found


def _why_nothing(argument: Path) -> str:
    if argument.is_dir():
        return f"folder {argument} holds no image; images end in {', '.join(IMAGE_SUFFIXES)}"
    if glob.has_magic(str(argument)):
        return f"no image matches {argument}; images end in {', '.join(IMAGE_SUFFIXES)}"
    return f"there is no file or folder {argument}{nearest_path(argument)}"


def nearest_path(path: Path) -> str:
    """Names what beside a missing `path` is most like it, as the end of a sentence."""
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    beside = itertools.islice(path.parent.iterdir(), _NAMES_COMPARED)
    near = nearest(path.name, (other.name for other in beside))
    return f"; {near}" if near.startswith("nearest") else f"; check what is in {path.parent}"


def _existing_folder(root: str | Path) -> Path:
    folder = Path(root).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; give a folder with one folder of images a class")
    raise UserError(f"there is no folder {folder}{nearest_path(folder)}")


def _parsed(split: str | None) -> tuple[str | None, tuple[int, int]]:
    """The name of a split, and from and to which percent of it is meant."""
    if split is None:
        return None, (0, 100)
    match = _PART.fullmatch(split)
    if match is None:
        raise UserError(
            f"split {split!r} cannot be read: a folder's splits are named alone or with a part in whole "
            "percents, such as 'train[:50%]'"
        )
    name, first, last = match.groups()
    start, stop = int(first or 0), 100 if last is None else int(last)
    if not start < stop <= 100:
        raise UserError(
            f"split {split!r} holds nothing: its percents must grow and end at 100 at most"
        )
    return name, (start, stop)


def _chosen(
    files: Sequence[str], side: str | None, percents: tuple[int, int]
) -> Bool[np.ndarray, "n"]:
    """Which files lie on a side of an undivided folder ("train", "val" or both), and there in a part."""
    fractions = np.array([path_fraction(file) for file in files])
    low, high = _DIVIDING.get(side or "", (0.0, 1.0))
    inside = (fractions - low) / (high - low)
    start, stop = percents[0] / 100, percents[1] / 100
    return (inside >= start) & (inside < stop)


def _part(folder: Path, split: str | None) -> tuple[Path, tuple[str, ...]]:
    """The folder that holds the class folders of `split`, and the names of the classes in order."""
    splits = folder_splits(folder)
    if splits == _UNDIVIDED:
        if split is not None and split not in (*_DIVIDING, *splits):
            raise UserError(
                f"folder {folder} is not divided into splits such as {split!r}; ask for 'train', 'val' "
                f"or 'all', or put class folders into {folder / split}"
            )
        return folder, _class_names(folder)
    known = ", ".join(splits)
    if split is None:
        raise UserError(f"folder {folder} is divided into {known}; say which split")
    name = split if split in splits else _SAME_SPLIT.get(split, split)
    if name not in splits:
        raise UserError(f"folder {folder} has no split {split!r}; it is divided into {known}")
    names = _class_names(folder / name)
    if "train" not in splits or name == "train":
        return folder / name, names
    trained = _class_names(folder / "train")
    if strange := sorted(set(names) - set(trained)):
        raise UserError(
            f"{folder / name} has classes that {folder / 'train'} does not have: {some(strange)}; "
            "rename or remove them there, or add them to train"
        )
    return folder / name, trained


def _class_names(part: Path) -> tuple[str, ...]:
    names = tuple(_class_folders(part))
    if not set(names) <= set(SPLITS):
        return names
    bare = part / names[0] if names else part
    raise UserError(
        f"folder {bare} holds no class folders; put the images of each class into a folder of its "
        f"name, such as {bare / 'cat'}"
    )


def _class_folders(part: Path) -> list[str]:
    with os.scandir(part) as entries:
        return sorted(
            entry.name for entry in entries if entry.is_dir() and not _ignored(entry.name)
        )


def _images_below(folder: Path) -> list[str]:
    """The images at any depth, relative to `folder` and sorted."""
    seen = set()
    found = []
    for where, subfolders, names in os.walk(folder, followlinks=True):
        status = os.stat(where)  # noqa: PTH116, a string, for speed
        if (status.st_dev, status.st_ino) in seen:  # a link to what was read, or to a parent
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not _ignored(name))
        inside = where[len(str(folder)) :].strip(os.sep).replace(os.sep, "/")
        found += [f"{inside}/{name}" if inside else name for name in names if _is_image(name)]
    return sorted(found)


def _is_image(name: str) -> bool:
    return name.lower().endswith(IMAGE_SUFFIXES) and not _ignored(name)


def _ignored(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"
