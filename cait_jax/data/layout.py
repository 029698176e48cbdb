"""How a folder of classes is divided into splits: `SPLIT/CLASS`, or not at all; a mixture is refused."""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from cait_jax.data.image_files import has_images, images_below, subfolders
from cait_jax.errors import UserError, composed, some

# What a split is for, and the words for it, as Kaggle, Roboflow, TFDS and torchvision have them.
_WORDS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "eval", "evaluation", "dev", "development"),
    "test": ("test", "testing"),
}
_PURPOSE = {word: purpose for purpose, words in _WORDS.items() for word in words}
_FILLING = frozenset({"set", "split", "data", "dataset", "images", "imgs"})
# What lies in a folder of images and annotations, none of it a class.
_WRAPPERS = frozenset({"images", "image", "imgs", "img", "jpegimages"})
_ANNOTATIONS = frozenset({"labels", "label", "annotations", "masks"})
_DEEPEST = 4


@dataclass(frozen=True)
class Layout:
    """How a folder is divided.

    Attributes:
      splits: purpose (`"train"`, `"val"`, `"test"`, in this order) to the split's folder, relative to the whole;
        empty where the folder holds the classes itself.
      beside: folders with images beside the splits that are none of them.
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
    """The class that a folder's name stands for: composed (NFC), bytes that are not UTF-8 as `\\xNN`."""
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
      UserError: it cannot be told what is a split and what is a class; what was found is named.
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


def check_classes(part: Path, names: Sequence[str]) -> None:
    """Refuses folders that hold no classes, though they hold folders, or none.

    Args:
      part: the folder of the classes.
      names: the names of the folders in it.

    Raises:
      UserError: naming the folder that is meant instead, where there is one.
    """
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
