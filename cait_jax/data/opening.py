"""Images beyond plain JPEG: the other formats, deep samples, transparency and EXIF orientation.

As with JPEG, chunks that hold no pixels never reach Pillow, which refuses a picture for a bad checksum in one.
Of TIFF, Pillow refuses most depths above 8 bits, and of some gives wrong levels without an error: 12 bits, 16 bits
in separate planes or with white as zero, signed integers. OpenCV decodes those, to be scaled as the tags state.
"""

import contextlib
import ctypes
import functools
import io
import logging
import re
import struct
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    PngImagePlugin,
    PpmImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from cait_jax.data.image_files import missing_decoder
from cait_jax.data.split import BrokenImage

_Check = Callable[[tuple[int, int]], None]
_Reader = Callable[[bytes, _Check], Image.Image]

# By EXIF orientation: what turns an image upright, and what that does to its sides.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_UPSIDE_DOWN, _MIRRORED, _ON_ITS_SIDE = (3, 4, 7, 8), (2, 3, 6, 7), (5, 6, 7, 8)
_PNG_GREY, _PNG_RGB = 0, 2
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_NO_IMAGE = "not a JPEG, PNG or WebP image, nor a GIF, BMP, TIFF, PPM, AVIF or HEIF"

# Tags of TIFF.
_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES, _MAX_SAMPLE, _PLANES, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 277, 281, 284, 338, 339
_S_MAX_SAMPLE = 341
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB = 0, 1, 2
_UNSIGNED, _FLOAT = 1, 3
_ASSOCIATED, _UNASSOCIATED = 1, 2
_LZMA, _ZSTD = 34925, 50000


def open_image(data: bytes, check: _Check) -> Image.Image:
    """Reads the header of an encoded image that is no JPEG.

    Args:
      data: a PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or HEIF.
      check: called with width and height before anything is decoded.

    Returns:
      The image, to be decoded by its `load`. A TIFF whose samples are not of 8 bits is decoded already.

    Raises:
      BrokenImage: there is no decoder.
      Exception: of any type, as Pillow's readers report broken files.
    """
    if not data:
        raise BrokenImage("the file is empty")
    reader = next((cls for start, cls in _READERS if re.match(start, data, re.DOTALL)), None)
    if reader is None:
        raise BrokenImage(_NO_IMAGE)
    return reader(data, check)


def to_opaque_eight_bits(image: Image.Image) -> Image.Image:
    """A loaded image with 8-bit samples, composited over white where it is transparent.

    Deeper samples are scaled so that the format's white becomes 255. An alpha channel that is zero everywhere, in
    a file that does not declare one, is no transparency: the fourth byte of a BMP, unspecified samples of a TIFF.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled_image(image)
    if image.has_transparency_data:
        image = image.convert("RGB") if _alpha_means_nothing(image) else _over_white(image)
    return image


def exif_orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8, of a loaded image or an opened JPEG: 1 (upright) where there is none."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader reports broken EXIF in any type; the picture is whole
        return 1
    return orientation if orientation in _TURNS else 1


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """The image turned upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def stored_box(
    box: tuple[int, int, int, int], size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """A box (top, left, height, width) of the upright image of `size` in coordinates of the stored one."""
    top, left, height, width = box
    if orientation in _UPSIDE_DOWN:
        top = size[0] - top - height
    if orientation in _MIRRORED:
        left = size[1] - left - width
    return (left, top, width, height) if orientation in _ON_ITS_SIDE else (top, left, height, width)


def _png(data: bytes, check: _Check) -> Image.Image:
    data, transparency = _pixels_of_png(data)
    image = PngImagePlugin.PngImageFile(io.BytesIO(data))
    check(image.size)
    depth, colour = data[24:26]
    if transparency and colour == _PNG_GREY and depth in (2, 4):
        # Pillow scales the levels, but not the one that is transparent.
        level = int.from_bytes(transparency[:2]) & (2**depth - 1)
        image.info["transparency"] = level * (255 // (2**depth - 1))
    if transparency and colour == _PNG_RGB and depth == 16:
        # Pillow keeps 8 bits of levels, and 16 of the one that is transparent.
        return _by_opencv(data)
    return image


def _pixels_of_png(data: bytes) -> tuple[bytes, bytes]:
    """Leaves out chunks that hold no pixels, and of others those that are damaged, as libpng does; and tRNS."""
    kept, at, transparency = [data[:8]], 8, b""
    while len(data) >= at + 12:
        length, name = struct.unpack_from(">I4s", data, at)
        end = at + 12 + length
        if end > len(data) or not name.isalpha():
            break
        critical = name[0] & 0x20 == 0
        whole = critical or (
            name in (b"tRNS", b"eXIf")
            and zlib.crc32(data[at + 4 : end - 4]) == int.from_bytes(data[end - 4 : end])
        )
        if name == b"tRNS" and whole:
            transparency = data[at + 8 : end - 4]
        if whole:
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]]), transparency


def _by_opencv(data: bytes) -> Image.Image:
    import cv2

    levels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if levels is None:
        raise BrokenImage("the PNG is damaged")
    return Image.fromarray(to_uint8(levels[..., [2, 1, 0, 3]], 65535))


def _high_efficiency(data: bytes, check: _Check) -> Image.Image:
    """AVIF or HEIF, which share a container: its first box lists the brands."""
    box = data[: min(int.from_bytes(data[:4]), 4096)]
    brands = {box[8:12], *(box[start : start + 4] for start in range(16, len(box), 4))}
    if brands & {b"avif", b"avis"}:
        if missing := missing_decoder(".avif"):
            raise BrokenImage(f"AVIF needs a newer Pillow: {missing}")
        from PIL import AvifImagePlugin

        return _by_plugin(AvifImagePlugin.AvifImageFile, data, check)
    if not brands & _HEIF:
        raise BrokenImage(_NO_IMAGE)
    if missing := missing_decoder(".heif"):
        raise BrokenImage(f"HEIF needs pillow-heif: {missing}")
    from pillow_heif import HeifImageFile

    return _by_plugin(HeifImageFile, data, check)


def _by_plugin(
    plugin: Callable[[io.BytesIO], Image.Image], data: bytes, check: _Check
) -> Image.Image:
    image = plugin(io.BytesIO(data))
    check(image.size)
    return image


def _tiff(data: bytes, check: _Check) -> Image.Image:
    _silence_libtiff()
    tags = _tags(data)
    if _WIDTH not in tags or _HEIGHT not in tags:
        raise BrokenImage("its header is damaged or cut short")
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
    return _tiff_image(_levels(data, tags), tags)


@functools.cache
def _silence_libtiff() -> None:
    """Drops what Pillow's libtiff and its reader write, which name no file; both raise errors as well."""
    logging.getLogger(TiffImagePlugin.__name__).setLevel(logging.CRITICAL)
    with contextlib.suppress(OSError, AttributeError):  # linked into Pillow without its symbols
        library = ctypes.CDLL(Image.core.__file__)  # type: ignore[attr-defined] # Pillow exports it untyped
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
    return bool(tags.get(_PLANES, 1) != 1 and tags.get(_SAMPLES, 1) > 1)


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


def _unreadable(tags: Mapping[int, Any]) -> BrokenImage:
    bits, samples = _first(tags, _BITS, 1), tags.get(_SAMPLES, 1)
    return BrokenImage(
        f"a TIFF of {samples} sample{'s' * (samples != 1)} of {bits} bits a pixel that is damaged, or of a kind "
        "that cannot be read; save it as PNG"
    )


def _tiff_image(levels: np.ndarray, tags: Mapping[int, Any]) -> Image.Image:
    inverted = tags.get(_PHOTOMETRIC, _BLACK_IS_ZERO) == _WHITE_IS_ZERO
    eight = to_uint8(levels, _white(levels, tags), inverted=inverted)
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
    stored: int = _first(tags, _BITS, bits)
    if stored < bits:  # shifted up
        return ((1 << stored) - 1) << (bits - stored)
    # A greatest value of all ones states the depth; any other is a statistic of the image.
    for tag in (_S_MAX_SAMPLE, _MAX_SAMPLE):
        stated: int = _first(tags, tag, 0)
        if stated in {2**depth - 1 for depth in range(8, bits)} and levels.max() <= stated:
            return stated
    if bits == 32:
        return usual_white(levels)
    return int(np.iinfo(levels.dtype).max)


def to_uint8(
    levels: np.ndarray, white: int | float, *, inverted: bool = False
) -> UInt8[np.ndarray, "..."]:
    """Scales levels from [0, white] to [0, 255]; values outside are clipped, NaN is 0.

    Args:
      levels: of any dtype and shape.
      white: the level of white; of black, if inverted.
      inverted: whether 0 is white.
    """
    if white == 65535 and levels.dtype.kind == "u" and not inverted:
        return (levels >> 8).astype(np.uint8)  # as Pillow reduces colours of 16 bits
    with np.errstate(invalid="ignore"):  # NaNs that signal
        levels = np.clip(np.nan_to_num(levels.astype(np.float64), nan=0.0), 0, white)
    return np.rint((white - levels if inverted else levels) * (255 / white)).astype(np.uint8)


def usual_white(levels: Any) -> int | float:
    """The white of 32-bit integers and of floats, which is not stored: the least usual one that holds all."""
    peak = levels.max(initial=0, where=np.isfinite(levels))
    usual = (1, 255, 65535) if levels.dtype.kind == "f" else (255, 65535)
    return next((white for white in usual if peak <= white), float(peak))


def _scaled_image(image: Image.Image) -> Image.Image:
    levels = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF that was opened by Pillow
    sixteen = image.mode.startswith("I;16") or image.format == "PPM"
    white = 2 ** tags.get(258, (16,))[0] - 1 if sixteen else usual_white(levels)
    if sixteen:
        levels = levels.astype(np.uint16)
    grey = Image.fromarray(to_uint8(levels, white, inverted=tags.get(262) == 0))
    transparent = image.info.get("transparency")
    if transparent is not None:  # a grey level of a PNG
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _alpha_means_nothing(image: Image.Image) -> bool:
    undeclared = image.format == "BMP" or (
        image.format == "TIFF"
        and not {1, 2} & set(getattr(image, "tag_v2", {}).get(_EXTRA_SAMPLES, ()))
    )
    return undeclared and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied; Pillow knows no direct way from here to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


_READERS: tuple[tuple[bytes, _Reader], ...] = (
    (rb"\x89PNG\r\n\x1a\n", _png),
    (rb"RIFF.{4}WEBP", functools.partial(_by_plugin, WebPImagePlugin.WebPImageFile)),
    (rb"GIF8[79]a", functools.partial(_by_plugin, GifImagePlugin.GifImageFile)),
    (rb"BM", functools.partial(_by_plugin, BmpImagePlugin.BmpImageFile)),
    (rb"II[*+]\0|MM\0[*+]", _tiff),
    (rb"P[1-6]\s", functools.partial(_by_plugin, PpmImagePlugin.PpmImageFile)),
    (rb".{4}ftyp", _high_efficiency),
)
