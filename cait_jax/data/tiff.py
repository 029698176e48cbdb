"""TIFF images of any depth: Pillow's where samples have 8 bits, else OpenCV's levels, scaled by what the tags say.

Pillow refuses most depths above 8, and of some gives wrong levels without a word: 12 bits, 16 bits in separate
planes or with white as zero, signed integers.
"""

import contextlib
import ctypes
import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

from cait_jax.data.levels import scaled, usual_white
from cait_jax.errors import UserError

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES, _MAX_SAMPLE, _PLANES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 277, 281, 284, 338, 339
_S_MAX_SAMPLE = 341
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _FLOAT = 1, 3
_ASSOCIATED, _UNASSOCIATED = 1, 2
_LZMA, _ZSTD = 34925, 50000


def open_tiff(data: bytes, check: Callable[[tuple[int, int]], None]) -> Image.Image:
    """Opens a TIFF; it is decoded already unless its samples are unsigned and have 8 bits or less.

    Args:
      data: the file.
      check: is given width and height before anything is decoded.

    Raises:
      UserError: the depth is none that can be read, or the file is damaged.
      Exception: as Pillow's reader reports broken files.
    """
    _silence_libtiff()
    tags = _tags(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise UserError("its header is damaged or cut short")
    if _for_pillow(tags):
        try:
            image = TiffImagePlugin.TiffImageFile(io.BytesIO(data))
        except SyntaxError as error:
            if "unknown pixel mode" not in str(error):
                raise
            raise _unreadable(tags) from error
        check(image.size)
        return image
    check((tags[_WIDTH], tags[_HEIGHT]))
    return _scaled(_levels(data, tags), tags)


@functools.cache
def _silence_libtiff() -> None:
    """Drops what Pillow's libtiff and its reader write, which name no file; both raise errors beside."""
    logging.getLogger(TiffImagePlugin.__name__).setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):  # linked into Pillow without its symbols
        library = ctypes.CDLL(Image.core.__file__)
        for name in ("TIFFSetErrorHandler", "TIFFSetWarningHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)


def _tags(data: bytes) -> Mapping[int, Any]:
    """The tags of the first image."""
    head = data[:16] if data[2:4] in (b"+\0", b"\0+") else data[:8]
    tags = TiffImagePlugin.ImageFileDirectory_v2(head)
    file = io.BytesIO(data)
    file.seek(tags.next)
    tags.load(file)
    return tags


def _for_pillow(tags: Mapping[int, Any]) -> bool:
    bits, sample_format = _first(tags, _BITS, 1), _first(tags, _SAMPLE_FORMAT, _UNSIGNED)
    colours = tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO)
    if colours not in (_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB):
        return True
    if bits <= 8 and sample_format == _UNSIGNED:
        return True
    # OpenCV's libtiff lacks these; of the kinds here Pillow's levels are right.
    packed = tags.get(_COMPRESSION) in (_LZMA, _ZSTD) and not _in_planes(tags)
    kinds = ((16, _UNSIGNED), (32, _FLOAT))
    return packed and colours != _WHITE_IS_ZERO and (bits, sample_format) in kinds


def _in_planes(tags: Mapping[int, Any]) -> bool:
    return tags.get(_PLANES, 1) != 1 and tags.get(_SAMPLES, 1) > 1


def _levels(data: bytes, tags: Mapping[int, Any]) -> np.ndarray:
    """Levels (h, w) or (h, w, 3 or 4) as they are stored, upright; 10, 12 and 14 bits in the upper ones of 16."""
    import cv2

    if _in_planes(tags):  # which OpenCV takes for interleaved
        raise _unreadable(tags)
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # it names no file
    levels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if levels is None:
        raise _unreadable(tags)
    return levels if levels.ndim == 2 else levels[..., [2, 1, 0, 3][: levels.shape[2]]]


def _first(tags: Mapping[int, Any], tag: int, default: Any) -> Any:
    value = tags.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _unreadable(tags: Mapping[int, Any]) -> UserError:
    bits, samples = _first(tags, _BITS, 1), tags.get(_SAMPLES, 1)
    return UserError(
        f"a TIFF of {samples} sample{'s' * (samples != 1)} of {bits} bits a pixel that is damaged, or of a kind "
        "that cannot be read; save it as PNG"
    )


def _scaled(levels: np.ndarray, tags: Mapping[int, Any]) -> Image.Image:
    inverted = tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) == _WHITE_IS_ZERO
    eight = scaled(levels, _white(levels, tags), inverted=inverted)
    if eight.ndim == 2 or eight.shape[2] == 3:
        return Image.fromarray(eight)
    # The colours of associated alpha are multiplied by it.
    extra = _first(tags, _EXTRA_SAMPLES, None)
    if extra == _ASSOCIATED:
        return Image.frombytes("RGBa", (eight.shape[1], eight.shape[0]), eight.tobytes())
    if extra == _UNASSOCIATED or (extra is None and eight[..., 3].any()):
        return Image.fromarray(eight)
    return Image.fromarray(np.ascontiguousarray(eight[..., :3]))


def _white(levels: np.ndarray, tags: Mapping[int, Any]) -> int | float:
    """The level of white in `levels`."""
    kind, bits = levels.dtype.kind, levels.dtype.itemsize * 8
    if kind == "f":
        return usual_white(levels)
    stored = _first(tags, _BITS, bits)
    if stored < bits:  # shifted up
        return (2**stored - 1) << (bits - stored)
    # A greatest value of all ones states the depth; any other is a statistic of the image.
    for tag in (_S_MAX_SAMPLE, _MAX_SAMPLE):
        stated = _first(tags, tag, 0)
        if stated in {2**depth - 1 for depth in range(8, bits)} and levels.max() <= stated:
            return stated
    if bits == 32:
        return usual_white(levels)
    return int(np.iinfo(levels.dtype).max)
