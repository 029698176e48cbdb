"""Which files are images, by their names: below a folder, and among arguments. Loads no decoder."""

import functools
import glob
import hashlib
import importlib.util
import itertools
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int32

from cait_jax.errors import UserError, composed, nearest, printable
from cait_jax.reading import MAX_IMAGE, read_bytes

SUFFIXES = {
    ".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".jif": "JPEG", ".jfi": "JPEG",
    ".png": "PNG", ".apng": "PNG",
    ".webp": "WEBP",
    ".gif": "GIF",
    ".bmp": "BMP", ".dib": "BMP",
    ".tif": "TIFF", ".tiff": "TIFF",
    ".ppm": "PPM", ".pgm": "PPM", ".pbm": "PPM", ".pnm": "PPM",
    ".avif": "AVIF",
    ".heic": "HEIF", ".heif": "HEIF", ".hif": "HEIF",
}  # fmt: skip
"""Formats by suffix in lower case, those included that need an extra."""

HEIF_EXTRA = 'pip install "cait-jax[heif]"'
AVIF_PILLOW = 'pip install "pillow>=11.3"'


def missing_decoder(suffix: str) -> str | None:
    """What reads files of a suffix that cannot be read here.

    Args:
      suffix: with its dot, in any case, such as `".HEIC"`.

    Returns:
      A command that installs the decoder; None if there is one already, or none is known.
    """
    match SUFFIXES.get(suffix.lower()):
        case "HEIF":
            return None if importlib.util.find_spec("pillow_heif") else HEIF_EXTRA
        case "AVIF":
            from PIL import features

            # Pillow without AVIF does not know the name of the feature.
            return None if "avif" in features.get_supported() else AVIF_PILLOW
    return None


@functools.cache
def readable_suffixes() -> tuple[str, ...]:
    """The suffixes that can be read here."""
    return tuple(suffix for suffix in SUFFIXES if missing_decoder(suffix) is None)


# What file systems, NAS, cameras and editors leave among pictures, casefolded. Hidden names count as such too.
_SYSTEM = frozenset(
    {
        "@eadir", "@tmp", "@recycle", "@recently-snapshot", "@__thumb", "#recycle", "#snapshot", "$recycle.bin",
        "recycler", "recycled", "system volume information", "lost+found", "lost.dir", "found.000",
        "network trash folder", "temporary items", "__macosx", "__pycache__", "thumbs.db", "ehthumbs.db",
        "ehthumbs_vista.db", "desktop.ini", "autorun.inf", "picasa.ini", "zbthumbnail.info", "icon\r",
    }
)  # fmt: skip
_SYSTEM_SUFFIXES = ("~", ".tmp", ".swp")
# Folders of cameras' cards. They may be a class's name, so they are passed over only without an image.
_CAMERA = frozenset({"misc", "private", "avchd", "avf_info", "canonmsc", "mp_root"})
_NAMES_COMPARED = 10_000
_SUFFIX = re.compile(r"\.[A-Za-z0-9_]{1,10}")


@dataclass(frozen=True)
class Images:
    """What a folder holds.

    Attributes:
      paths: the images, relative to the folder, with forward slashes, sorted by their composed form.
      others: the other files, relative to the folder, unsorted, without those of systems.
    """

    paths: list[str]
    others: list[str]


def images_below(folder: str | Path) -> Images:
    """The images at any depth. Links to folders are followed once; files of systems count for nothing.

    Raises:
      OSError: a folder cannot be listed.
    """
    seen = set()
    found: list[str] = []
    others: list[str] = []
    for where, subfolders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(where)  # noqa: PTH116, a string, for speed
        if (status.st_dev, status.st_ino) in seen:  # a link to what was read, or to a parent
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        subfolders[:] = sorted(name for name in subfolders if not is_system(name))
        inside = where[len(str(folder)) :].strip(os.sep).replace(os.sep, "/")
        for name in names:
            if not is_system(name):
                kind = found if is_image(name) else others
                kind.append(f"{inside}/{name}" if inside else name)
    return Images(sorted(found, key=lambda path: (composed(path), path)), others)


def _refuse(error: OSError) -> None:
    raise error  # os.walk passes over a folder that it cannot list


def by_suffix(paths: Iterable[str]) -> Counter[str]:
    """How many files there are of each suffix in lower case; `""` where a name has none that looks like one."""
    return Counter(map(_suffix_of, paths))


def subfolders(folder: str | Path) -> list[str]:
    """The names of the folders in a folder, sorted; those of systems are passed over.

    Raises:
      UserError: a link without a suffix, as to a folder, leads nowhere.
    """
    names = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if is_system(entry.name):
                continue
            if entry.is_dir():
                names.append(entry.name)
            elif entry.is_symlink() and not _suffix_of(entry.name) and not os.path.exists(entry):  # noqa: PTH110
                target = os.readlink(entry)  # noqa: PTH115
                raise UserError(
                    f"{entry.path} is a link to {target}, which does not exist: mend the link or remove it"
                )
    names.sort()
    return [
        name for name in names
        if name.casefold() not in _CAMERA or images_below(Path(folder) / name).paths
    ]  # fmt: skip


def has_images(folder: str | Path) -> bool:
    """Whether a folder itself holds images."""
    return count_images(folder) > 0


def count_images(folder: str | Path) -> int:
    """The number of images in a folder itself."""
    with os.scandir(folder) as entries:
        return sum(is_image(entry.name) and not entry.is_dir() for entry in entries)


def is_image(name: str) -> bool:
    """Whether a file of this name is read."""
    return name.lower().endswith(readable_suffixes()) and not is_system(name)


def is_system(name: str) -> bool:
    """Whether a name is hidden, or one that systems, NAS and editors give to files of their own."""
    folded = name.casefold()
    return name.startswith((".", "~$")) or folded in _SYSTEM or folded.endswith(_SYSTEM_SUFFIXES)


def _suffix_of(path: str) -> str:
    suffix = os.path.splitext(path)[1].lower()  # noqa: PTH122, a string, for speed
    return suffix if _SUFFIX.fullmatch(suffix) else ""


def left_out_in_words(left_out: Mapping[str, int], where: str | Path) -> str | None:
    """Says what is not read, in one sentence; None where nothing is left out.

    Args:
      left_out: counts by suffix, or of images by a folder's name that ends in a slash; `"./"` counts those that
        are in no folder.
      where: what holds them.
    """
    if not left_out:
        return None
    total = sum(left_out.values())
    files = "1 file" if total == 1 else f"{total:,} files"
    return printable(f"left out of {where}: {files} ({counts_in_words(left_out)})")


def counts_in_words(left_out: Mapping[str, int]) -> str:
    """Counts as for `left_out_in_words`, the greatest first, each with the extra that reads such files."""
    parts = []
    for name, count in sorted(left_out.items(), key=lambda item: (-item[1], item[0])):
        if name == "./":
            parts.append(f"{count:,} images outside the class folders")
        elif name.endswith("/"):
            parts.append(f"{count:,} images in {name}")
        else:
            parts.append(f"{count:,} {name or 'without a suffix'}{_reader(name)}")
    return ", ".join(parts)


def _reader(suffix: str) -> str:
    install = missing_decoder(suffix)
    return f", read after {install}" if install else ""


@dataclass(frozen=True, eq=False)
class FolderRecords:
    """Records of image files, read on access.

    Attributes:
      root: the folder that `files` are relative to.
      files: paths with forward slashes, in the order of the records.
      left_out: how many other files and images of folders are not read, as for `left_out_in_words`.
    """

    root: Path
    files: tuple[str, ...] = field(repr=False)
    labels: Int32[np.ndarray, "n"] = field(repr=False)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        """The number of files."""
        return len(self.files)

    @property
    def files_sha256(self) -> str:
        """A checksum of the names and labels of the files, in order."""
        pairs = zip(self.files, self.labels, strict=True)
        listed = "".join(f"{name}\0{label}\0" for name, label in pairs)
        return hashlib.sha256(listed.encode(errors="surrogateescape")).hexdigest()

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """The encoded `image`, its `label` and its `file_name` relative to `root`."""
        name = self.files[index]
        try:
            image = read_bytes(self.root / name, MAX_IMAGE)
        except OSError as error:
            again, advice = "", "make it readable or leave it out"
            if isinstance(error, FileNotFoundError):
                again, advice = " any more", "put it back or open the folder again"
            raise UserError(
                f"image {self.root / name} cannot be read{again}: {error.strerror}; {advice}"
            ) from error
        return {"image": image, "label": int(self.labels[index]), "file_name": name}


@dataclass(frozen=True)
class Arguments:
    """What arguments name.

    Attributes:
      paths: the images, every file once.
      left_out: of folders and patterns, what is not read, by suffix.
    """

    paths: list[Path]
    left_out: Counter[str]


def find_images(arguments: Sequence[str | Path]) -> Arguments:
    """Finds the images that files, folders and patterns name.

    A path that does not exist as it is written means the one that is equal to it in Unicode's composed form.

    Args:
      arguments: files, of any suffix; folders, of which all images are meant at any depth; and
        patterns such as `"*.jpg"` or `"photos/**/*.png"`, of which all images and folders are meant.
        `~` is the home directory.

    Returns:
      The paths in the order of the arguments, sorted within each; and what is left out.

    Raises:
      UserError: an argument names no image.
    """
    paths: dict[str, Path] = {}
    others: dict[str, Path] = {}
    for argument in arguments:
        given = Path(argument).expanduser()
        found, rest = _named_by(as_on_disk(given))
        if not found:
            raise UserError(_why_nothing(given, by_suffix(map(str, rest))))
        for kind, of_kind in ((paths, found), (others, rest)):
            for path in of_kind:
                kind.setdefault(os.path.abspath(path), path)  # noqa: PTH100, a link is another image
    return Arguments(list(paths.values()), by_suffix(others.keys() - paths.keys()))


def expand_images(arguments: Sequence[str | Path]) -> list[Path]:
    """The `paths` of `find_images`."""
    return find_images(arguments).paths


def as_on_disk(path: Path) -> Path:
    """The existing path that equals `path` in Unicode's composed form; `path` itself if there is none."""
    if path.exists() or str(path).isascii():
        return path
    if path.parent == path or not (parent := as_on_disk(path.parent)).is_dir():
        return path
    same = (name for name in os.listdir(parent) if composed(name) == composed(path.name))  # noqa: PTH208
    return parent / next(same, path.name)


def existing_folder(root: str | Path) -> Path:
    """The folder that a path names, in whichever Unicode form its letters are on the disk.

    Raises:
      UserError: there is none; what is like it is named.
    """
    folder = as_on_disk(Path(root).expanduser())
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{folder} is a file; give a folder with one folder of images a class")
    raise UserError(f"there is no folder {folder}{nearest_path(folder)}")


def _named_by(argument: Path) -> tuple[list[Path], list[Path]]:
    """The images that an argument names, and the other files."""
    if argument.is_dir():
        return _below(argument)
    if argument.exists():
        return [argument], []
    images: list[Path] = []
    others: list[Path] = []
    if glob.has_magic(str(argument)):
        for path in _matches(str(argument)):
            if path.is_dir():
                inside, rest = _below(path)
                images += inside
                others += rest
            elif not is_system(path.name):
                (images if is_image(path.name) else others).append(path)
    return images, others


def _below(folder: Path) -> tuple[list[Path], list[Path]]:
    held = images_below(folder)
    return [folder / name for name in held.paths], [folder / name for name in held.others]


def _matches(pattern: str) -> Iterator[Path]:
    """What a pattern matches, in whichever form its letters are on the disk."""
    patterns = {pattern: None} | {
        unicodedata.normalize(form, pattern): None for form in ("NFC", "NFD")
    }
    matches = {
        match: None
        for each in patterns
        for match in sorted(glob.glob(each, recursive=True))  # noqa: PTH207, absolute ones too
    }
    return map(Path, matches)


def _why_nothing(argument: Path, left_out: Mapping[str, int]) -> str:
    aside = left_out_in_words(left_out, argument)
    aside = f"; {aside}" if aside else ""
    if argument.is_dir():
        return f"folder {argument} holds no image; images end in {', '.join(readable_suffixes())}{aside}"
    if glob.has_magic(str(argument)):
        return f"no image matches {argument}; images end in {', '.join(readable_suffixes())}{aside}"
    return f"there is no file or folder {argument}{nearest_path(argument)}"


def nearest_path(path: Path) -> str:
    """The end of a sentence that names the most similar neighbour of a missing `path`."""
    if not path.parent.is_dir():
        return f"; its folder {path.parent} does not exist either"
    beside = itertools.islice(path.parent.iterdir(), _NAMES_COMPARED)
    near = nearest(path.name, (other.name for other in beside))
    return f"; {near}" if near.startswith("nearest") else f"; check what is in {path.parent}"
