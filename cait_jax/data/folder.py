"""Folders of photographs as splits: `CLASS/...`, or `SPLIT/CLASS/...`; a mixture is refused."""

import hashlib
import itertools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from cait_jax.data.image_files import (
    FolderRecords,
    by_suffix,
    count_images,
    counts_in_words,
    existing_folder,
    has_images,
    images_below,
    left_out_in_words,
    readable_suffixes,
    subfolders,
)
from cait_jax.data.split import Encoded
from cait_jax.errors import UserError, composed, some

# What a split is for, and the words for it, as Kaggle, Roboflow, TFDS and torchvision have them.
_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "eval", "evaluation", "dev", "development"),
    "test": ("test", "testing"),
}
_PURPOSE = {word: purpose for purpose, words in _WORDS.items() for word in words}
_FILLING = frozenset({"set", "split", "data", "dataset", "images", "imgs"})
# Folders of images and annotations, none of them a class.
_WRAPPERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
_ANNOTATIONS = frozenset({"labels", "label", "annotations", "masks"})
_DEEPEST = 4
_UNDIVIDED = ("all",)
# Between which fractions the paths of each side of an undivided folder are.
_DIVIDING = {"train": (0.1, 1.0), "val": (0.0, 0.1)}
_PART = re.compile(r"(\w+)(?:\[(?:(\d+)%)?:(?:(\d+)%)?\])?")


@dataclass(frozen=True)
class Layout:
    """How a folder is divided.

    `splits` maps `"train"`, `"val"` and `"test"`, in this order, to relative paths; it is empty where the folder
    holds the classes itself. `beside` are other folders that hold images.
    """

    splits: Mapping[str, str]
    beside: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The splits as their folders are called."""
        return tuple(path.split("/")[0] for path in self.splits.values())


def purpose_of(name: str) -> str | None:
    """What a split of this name is for: `"train"`, `"val"` or `"test"`; None for any other name.

    Case does not matter, nor words such as "set": `"Training_Set"` is for training.
    """
    words = [word for word in _words(name) if word not in _FILLING]
    return _PURPOSE.get(words[0].removesuffix("set")) if len(words) == 1 else None


def class_name(folder: str) -> str:
    """The class of a folder's name: composed (NFC), bytes that are not UTF-8 as `\\xNN`."""
    return composed(os.fsencode(folder).decode("utf-8", "backslashreplace"))


def class_folders(part: Path) -> dict[str, list[str]]:
    """Classes in order, each with its folders: those whose names differ in Unicode's form are of one class."""
    classes: dict[str, list[str]] = {}
    for folder in subfolders(part):
        classes.setdefault(class_name(folder), []).append(folder)
    return dict(sorted(classes.items()))


def read_layout(folder: Path) -> Layout:
    """Finds the splits of a folder.

    A split is a folder whose name `purpose_of` knows and that has folders itself; without folders it is a class,
    such as the trains among vehicles, or images without labels. A split's only folder may be called as it is.

    Raises:
      UserError: splits and classes cannot be told apart; what was found is named.
    """
    names = subfolders(folder)
    splits = {name: purpose for name in names if (purpose := purpose_of(name))}
    divided = {name: purpose for name, purpose in splits.items() if subfolders(folder / name)}
    flat = {name: purpose for name, purpose in splits.items() if name not in divided}
    others = [name for name in names if name not in splits]
    if not divided:
        _check_undivided(folder, flat, others)
        return Layout({})
    by_purpose: dict[str, list[str]] = {}
    for name, purpose in divided.items():
        by_purpose.setdefault(purpose, []).append(name)
    for purpose, same in by_purpose.items():
        if len(same) > 1:
            raise UserError(
                f"{folder} has {_listed(same)}, which both mean {purpose}: merge them, or move all but one of "
                "them elsewhere"
            )
    paths = {
        purpose: _unwrapped(folder, by_purpose[purpose][0])
        for purpose in _WORDS
        if purpose in by_purpose
    }
    beside = [name for name in others if images_below(folder / name).paths]
    _check_beside(folder, paths, beside)
    for name, purpose in flat.items():
        if purpose not in paths and purpose != "test" and has_images(folder / name):
            raise UserError(
                f"{folder} has {_listed(list(divided))} with folders of classes, and {name} with images but no "
                f"folders: put the images of {name} into a folder for each class, or move it elsewhere"
            )
    return Layout(paths, tuple(beside))


def _check_classes(part: Path, names: Sequence[str]) -> None:
    """Refuses a folder whose folders `names` are no classes; the error names those that are meant, if known."""
    if all(purpose_of(name) for name in names):
        bare = part / names[0] if names else part
        raise UserError(
            f"folder {bare} holds no class folders; put the images of each class into a folder of its "
            f"name, such as {bare / 'cat'}"
        )
    folded = {name.casefold() for name in names}
    if folded & _WRAPPERS and folded <= _WRAPPERS | _ANNOTATIONS:
        wrapper = next(name for name in names if name.casefold() in _WRAPPERS)
        raise UserError(
            f"folder {part} holds {_listed(names)}, which are no classes; images are read from a folder for "
            f"each class: give {part / wrapper} if it has them, or sort the images into some"
        )
    if len(names) == 1 and not has_images(part / names[0]):
        inside = [
            name for name in subfolders(part / names[0]) if images_below(part / names[0] / name).paths
        ]  # fmt: skip
        if len(inside) > 1:
            raise UserError(
                f"folder {part} holds one folder alone, {names[0]}, and that {some(inside)}: give "
                f"{part / names[0]} if these are the classes, or put their images right into {names[0]}"
            )


def _words(name: str) -> list[str]:
    return [word for word in re.split(r"[\s_.-]+", composed(name).casefold()) if word]


def _unwrapped(folder: Path, name: str) -> str:
    """The path of a split's classes, below folders called as the split is: `Training_Set/training_set`."""
    path = name
    for _ in range(_DEEPEST):
        match subfolders(folder / path):
            case [only] if purpose_of(only) == purpose_of(name) and subfolders(
                folder / path / only
            ):
                path = f"{path}/{only}"
            case _:
                break
    return path


def _check_undivided(folder: Path, flat: Mapping[str, str], others: Sequence[str]) -> None:
    if others and len(set(flat.values())) > 1:
        raise UserError(
            f"{folder} has {_listed(list(flat))}, which hold images but no folders of classes, beside "
            f"{some(others)}: sort the images of each split into a folder for each class"
        )
    _check_prefixed(folder, others)
    for name in others:
        where = folder / name
        for _ in range(_DEEPEST):
            inside = subfolders(where)
            purposes = {purpose for each in inside if (purpose := purpose_of(each))}
            nested = any(purpose_of(each) and subfolders(where / each) for each in inside)
            if nested and (len(others) == 1 or purposes - {"train"}):
                raise UserError(
                    f"{folder} holds no classes; its folder {where.relative_to(folder)} is divided into "
                    f"{_listed([each for each in inside if purpose_of(each)])}: give {where}"
                )
            if not nested and purposes - {"train"}:
                found = [each for each in inside if purpose_of(each)]
                raise UserError(
                    f"{where} holds {_listed(found)}: splits go above classes, as in "
                    f"{folder / found[0] / name}"
                )
            if len(inside) != 1 or has_images(where):
                break
            where /= inside[0]


def _check_prefixed(folder: Path, names: Sequence[str]) -> None:
    """Refuses names that differ in a split's word alone, such as `seg_train` and `seg_test`."""
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        words = _words(name)
        for place in {0, len(words) - 1} if len(words) > 1 else ():
            if purpose := _PURPOSE.get(words[place]):
                rest = tuple(words[:place] + words[place + 1 :])
                found.setdefault(rest, {})[purpose] = name
    for of_purpose in found.values():
        if len(of_purpose) > 1:
            renamed = " and ".join(of_purpose)
            raise UserError(
                f"{folder} has {_listed(list(of_purpose.values()))}, which look like splits: rename them to "
                f"{renamed}, or move all but one of them elsewhere"
            )


def _check_beside(folder: Path, splits: Mapping[str, str], beside: Sequence[str]) -> None:
    classes = {name for path in splits.values() for name in class_folders(folder / path)}
    known = ", ".join(path.split("/")[0] for path in splits.values())
    if mixed := [name for name in beside if class_name(name) in classes]:
        raise UserError(
            f"{folder} has splits ({known}) and classes ({some(mixed)}) side by side: move the classes into a "
            "split, or the splits elsewhere"
        )


def _listed(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else names[0]


def load_folder(root: str | Path, split: str | None = None, *, channels: int = 3) -> Encoded:
    """Opens a folder of images as a split, whose images are turned upright by their EXIF orientation.

    Either `root/CLASS/...` holds the images, or `root/SPLIT/CLASS/...`, where SPLIT is any word that `purpose_of`
    knows, such as `Training` or `valid`. Deeper folders belong to their class, links to folders are followed.
    Labels follow the sorted names of the classes in Unicode's composed form; beside a split to train on they are
    those of that split, and a class may have no image here.

    Where the folder is not divided, `"train"` and `"val"` divide it: an image is of `"val"` if its
    `path_fraction` is below 0.1. So each image stays on its side when others come or go, and on every
    machine. A part such as `"train[:50%]"` is taken by the same number, not by the order of the classes.

    Args:
      split: a split's name or another word for the same, such as `"val"` for `valid`, or a part of one in whole
        percents. Of a folder that is not divided, `"train"`, `"val"`, or `"all"`, which None means too.
      channels: 3 for RGB, 1 for luminance.

    Raises:
      UserError: the folder or the split does not exist, holds no classes, or a class no image; no image falls
        in the part; or splits and classes cannot be told apart.
    """
    folder = existing_folder(root)
    name, percents = _parsed(split)
    found = _find(folder, name)
    files, labels, others = _images_of_classes(found)
    part = found.part
    side = purpose_of(name) if part == folder and name is not None else None
    chosen = _chosen(files, side, percents)
    if not chosen.any():
        raise UserError(
            f"none of the {len(files)} images of {part} falls in {split!r}: ask for a greater part, "
            "or divide the folder into folders train and val"
        )
    left_out = {**by_suffix(others), **found.beside}
    if loose := count_images(part):
        left_out["./"] = loose
    kept = tuple(itertools.compress(files, chosen))
    records = FolderRecords(part, kept, np.array(labels, np.int32)[chosen], left_out)
    message = left_out_in_words(left_out, part)
    return Encoded(records, found.class_names, channels, exif=True, left_out=message)


def path_fraction(path: str) -> float:
    """A number in [0, 1) for a path, as if drawn uniformly, but the same on every machine.

    It is the first 8 bytes of the path's SHA-256 as a big-endian fraction; the path, relative to the folder of the
    classes, is taken in Unicode's composed form (NFC), since file systems differ in that.
    """
    name = composed(path).encode(errors="surrogateescape")
    # 53 bits are what a float holds.
    return (int.from_bytes(hashlib.sha256(name).digest()[:8]) >> 11) / 2**53


def folder_splits(root: str | Path) -> tuple[str, ...]:
    """The names of the folders that a folder of images is divided into; `"all"` if it holds the classes itself.

    Raises:
      UserError: the folder does not exist, or splits and classes cannot be told apart.
    """
    return read_layout(existing_folder(root)).names or _UNDIVIDED


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
    """Which files are on a side of an undivided folder ("train", "val" or both), and there in a part."""
    if side is None and percents == (0, 100):
        return np.full(len(files), True)
    fractions = np.array([path_fraction(file) for file in files])
    low, high = _DIVIDING.get(side or "", (0.0, 1.0))
    inside = (fractions - low) / (high - low)
    start, stop = percents[0] / 100, percents[1] / 100
    return (inside >= start) & (inside < stop)


@dataclass(frozen=True)
class _Found:
    part: Path  # holds the folders of the classes
    class_names: tuple[str, ...]
    of_training: bool = False  # whether the classes are those of another split
    beside: Mapping[str, int] = field(default_factory=dict)  # images of folders that are no split


def _find(folder: Path, split: str | None) -> _Found:
    layout = read_layout(folder)
    purpose = None if split is None else purpose_of(split)
    if not layout.splits:
        if split not in (None, *_UNDIVIDED) and purpose not in _DIVIDING:
            raise UserError(
                f"folder {folder} is not divided into splits such as {split!r}; ask for 'train', 'val' "
                f"or 'all', or put class folders into {folder / str(split)}"
            )
        return _Found(folder, _class_names(folder))
    known = ", ".join(layout.names)
    if split is None:
        raise UserError(f"folder {folder} is divided into {known}; say which split")
    if purpose is None or purpose not in layout.splits:
        raise UserError(
            f"folder {folder} has no split {split!r}; it is divided into {known}: choose one of these"
        )
    beside = {f"{name}/": len(images_below(folder / name).paths) for name in layout.beside}
    part = folder / layout.splits[purpose]
    names = _class_names(part)
    if "train" not in layout.splits or purpose == "train":
        return _Found(part, names, beside=beside)
    training = folder / layout.splits["train"]
    trained = _class_names(training)
    if strange := sorted(set(names) - set(trained)):
        raise UserError(
            f"{part} has classes that {training} does not have: {some(strange)}; "
            "rename or remove them there, or add them to train"
        )
    return _Found(part, trained, of_training=True, beside=beside)


def _class_names(part: Path) -> tuple[str, ...]:
    classes = class_folders(part)
    _check_classes(part, [folder for folders in classes.values() for folder in folders])
    return tuple(classes)


def _images_of_classes(found: _Found) -> tuple[list[str], list[int], list[str]]:
    """The images, relative to the split's folder, their labels, and the other files in the folders of the classes.

    Raises:
      UserError: no class has an image; or one has none, and other files, or is not of another split.
    """
    part, folders = found.part, class_folders(found.part)
    files: list[str] = []
    labels: list[int] = []
    others: list[str] = []
    empty = []
    for label, name in enumerate(found.class_names):
        held = [(folder, images_below(part / folder)) for folder in folders.get(name, ())]
        of_class = [f"{folder}/{file}" for folder, images in held for file in images.paths]
        unread = [file for _, images in held for file in images.others]
        if not of_class and (unread or not found.of_training):
            counts = counts_in_words(by_suffix(unread))
            empty.append(f"{name} ({counts})" if counts else name)
        files += of_class
        labels += [label] * len(of_class)
        others += unread
    if empty or not files:
        raise UserError(
            f"{part} has classes without an image that ends in {', '.join(readable_suffixes())}: "
            f"{some(empty or list(folders))}; fill or remove what is empty"
        )
    return files, labels, others
