"""Encoded bytes to an image of Pillow's, whatever else the file says: one answer on what can be read.

Pixels count, metadata do not: chunks and segments that hold no pixels never reach Pillow, which refuses a whole
picture for a long text or a bad checksum in one. Its warnings name no file and are dropped.
"""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    PpmImagePlugin,
    WebPImagePlugin,
)

from cait_jax.data.formats import missing_decoder
from cait_jax.data.levels import scaled
from cait_jax.data.tiff import open_tiff
from cait_jax.errors import UserError

_Check = Callable[[tuple[int, int]], None]
_Reader = Callable[[bytes, _Check], Image.Image]

_SILENT = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)
_START_OF_SCAN, _JPEG_LS, _COMMENT = 0xDA, 0xF7, 0xFE
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}
_PNG_GREY, _PNG_RGB = 0, 2
_HEIF = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"}
_NO_IMAGE = "not a JPEG, PNG or WebP image, nor a GIF, BMP, TIFF, PPM, AVIF or HEIF"


class BrokenImage(UserError):
    """The bytes are no image that can be decoded."""


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Reads the header of an encoded image.

    Not by `Image.open`, which guesses formats and whose check of the size warns or raises by a global.

    Args:
      data: a JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, AVIF or HEIF.
      max_pixels: more are refused.

    Returns:
      The image, to be decoded by its `load`. A TIFF whose samples are not of 8 bits is decoded already.

    Raises:
      BrokenImage: there is no decoder, or too many pixels.
      Exception: of any type, as Pillow's readers report broken files.
    """
    silence_warnings()
    if not data:
        raise BrokenImage("the file is empty")
    reader = next((cls for start, cls in _READERS if re.match(start, data, re.DOTALL)), None)
    if reader is None:
        raise BrokenImage(_NO_IMAGE)
    return reader(data, lambda size: check_pixels(size, max_pixels))


def check_pixels(size: tuple[int, int], most: int) -> None:
    """Refuses an image of `size` (width, height) that has more than `most` pixels."""
    count = size[0] * size[1]
    if count > most:
        raise BrokenImage(
            f"{size[0]:,} by {size[1]:,} pixels are {count:,}, more than the limit of {most:,}; shrink the "
            "image first"
        )


def silence_warnings() -> None:
    """Drops the warnings of Pillow's readers, in all threads.

    `warnings.catch_warnings` is not for threads, so the filter stays; it returns where it was taken out.
    """
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def _jpeg(data: bytes, check: _Check) -> Image.Image:
    image = JpegImagePlugin.JpegImageFile(io.BytesIO(_pixels_of_jpeg(data)))
    check(image.size)
    return image


def _pixels_of_jpeg(data: bytes) -> bytes:
    """Leaves out segments that hold neither pixels nor their colour space or orientation."""
    kept, at = [data[:2]], 2
    while (
        len(data) >= at + 4 and data[at] == 0xFF and data[at + 1] not in (0, 0xFF, _START_OF_SCAN)
    ):
        marker, end = data[at + 1], at + 2 + int.from_bytes(data[at + 2 : at + 4])
        content = data[at + 4 : end]
        if marker in _START_OF_FRAME and content[:1] not in (b"", b"\x08"):
            raise BrokenImage(
                f"a JPEG of {content[0]} bits a sample, which cannot be read; save it with 8 bits"
            )
        if marker == _JPEG_LS:
            raise BrokenImage("a JPEG-LS, which cannot be read; save it as PNG")
        if end > len(data) or _is_pixels(marker, content):
            kept.append(data[at:end])
        at = end
    return b"".join([*kept, data[at:]])


def _is_pixels(marker: int, content: bytes) -> bool:
    match marker:
        case 0xE0:  # JFIF
            return len(content) >= 14
        case 0xE1:
            return content.startswith(b"Exif\0\0")
        case 0xEE:  # Adobe's colour transform
            return len(content) >= 12
    return not (0xE0 <= marker <= 0xEF or marker == _COMMENT)


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
        return _by_opencv(
            data
        )  # Pillow keeps 8 bits of levels, and 16 of the one that is transparent
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
    return Image.fromarray(scaled(levels[..., [2, 1, 0, 3]], 65535))


def _high_efficiency(data: bytes, check: _Check) -> Image.Image:
    """AVIF or HEIF, which share a container: its first box lists the brands."""
    box = data[: min(int.from_bytes(data[:4]), 4096)]
    brands = {box[8:12], *(box[start : start + 4] for start in range(16, len(box), 4))}
    if brands & {b"avif", b"avis"}:
        if missing := missing_decoder(".avif"):
            raise BrokenImage(f"AVIF needs a newer Pillow: {missing}")
        from PIL import AvifImagePlugin

        return _by(AvifImagePlugin.AvifImageFile)(data, check)
    if not brands & _HEIF:
        raise BrokenImage(_NO_IMAGE)
    if missing := missing_decoder(".heif"):
        raise BrokenImage(f"HEIF needs pillow-heif: {missing}")
    from pillow_heif import HeifImageFile

    return _by(HeifImageFile)(data, check)


def _by(reader: Callable[[io.BytesIO], Image.Image]) -> _Reader:
    def read(data: bytes, check: _Check) -> Image.Image:
        image = reader(io.BytesIO(data))
        check(image.size)
        return image

    return read


_READERS: tuple[tuple[bytes, _Reader], ...] = (
    (rb"\xff\xd8\xff", _jpeg),
    (rb"\x89PNG\r\n\x1a\n", _png),
    (rb"RIFF.{4}WEBP", _by(WebPImagePlugin.WebPImageFile)),
    (rb"GIF8[79]a", _by(GifImagePlugin.GifImageFile)),
    (rb"BM", _by(BmpImagePlugin.BmpImageFile)),
    (rb"II[*+]\0|MM\0[*+]", open_tiff),
    (rb"P[1-6]\s", _by(PpmImagePlugin.PpmImageFile)),
    (rb".{4}ftyp", _high_efficiency),
)
