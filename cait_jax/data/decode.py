"""Encoded images to uint8 crops, in the arithmetic of torchvision and timm.

Every picture becomes 8-bit RGB or luminance: transparency lies over white, deeper pixels are scaled. EXIF
orientation is followed only where asked for: published scores of data sets were made without it.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import (
    BmpImagePlugin,
    ExifTags,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from cait_jax.errors import UserError

MAX_PIXELS = 89_478_485
"""The most pixels an image may have: 256 MiB of RGB, as Pillow's own default. More is refused unread."""

_READERS: tuple[tuple[bytes, type[ImageFile.ImageFile]], ...] = (
    (rb"\xff\xd8\xff", JpegImagePlugin.JpegImageFile),
    (rb"\x89PNG\r\n\x1a\n", PngImagePlugin.PngImageFile),
    (rb"RIFF.{4}WEBP", WebPImagePlugin.WebPImageFile),
    (rb"GIF8[79]a", GifImagePlugin.GifImageFile),
    (rb"BM", BmpImagePlugin.BmpImageFile),
    (rb"II[*+]\0|MM\0[*+]", TiffImagePlugin.TiffImageFile),
)
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
_UPSIDE_DOWN, _MIRRORED, _LYING = (3, 4, 7, 8), (2, 3, 6, 7), (5, 6, 7, 8)
_ATTEMPTS = 10
# A JPEG is shrunk while decoding only as far as the box stays this many times the crop. The crop is
# then about half a grey level from one of the full image, against up to two with no margin.
_JPEG_MARGIN = 2


class BrokenImage(UserError):
    """The bytes are no image that can be decoded."""


def decode_image(data: bytes, *, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a whole image, ignoring its EXIF orientation.

    Args:
      data: an encoded JPEG, PNG, WebP, GIF, BMP or TIFF image of any colour mode; of an animation,
        the first frame counts.
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The pixels, uint8 (height, width, channels).

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
    """
    with _broken_image():
        return _pixels(_convert(_open(data), channels))


def center_crop(
    image: bytes | Image.Image,
    *,
    image_size: tuple[int, int],
    crop_ratio: float = 1.0,
    channels: int = 3,
    exif: bool = False,
) -> UInt8[np.ndarray, "h w c"]:
    """Crops an image for evaluation: resized to cover, then cropped in the middle.

    The image is resized (bicubic, antialiased) so that it just covers `image_size / crop_ratio`,
    rounded down.

    Args:
      image: encoded as in `decode_image`, or opened by Pillow.
      image_size: height and width of the crop in pixels.
      crop_ratio: the part of the shorter side that the crop keeps, in (0, 1].
      channels: 3 for RGB, 1 for luminance.
      exif: whether the EXIF orientation is followed, as for photographs. A TIFF always stands
        upright.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the image cannot be decoded, or has more than `MAX_PIXELS` pixels.
    """
    height, width = image_size
    with _broken_image():
        image = _open(image)
        converted = _convert(image, channels)
        image = _turn(converted, _orientation(image) if exif else 1)
        resized = _covering_size(
            (image.height, image.width),
            (math.floor(height / crop_ratio), math.floor(width / crop_ratio)),
        )
        top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
        if math.prod(resized) > MAX_PIXELS:  # a hair of an image: only what is kept is enlarged
            across, down = image.width / resized[1], image.height / resized[0]
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
        image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
        return _pixels(image.crop((left, top, left + width, top + height)))


def random_resized_crop(
    data: bytes,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    channels: int = 3,
    exif: bool = False,
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image for training: a random box of it, resized (antialiased).

    A JPEG in colour or grey is decoded and resized by OpenCV, which is about 1.4 times as fast as Pillow
    (`benchmarks/input.py`), by the mean over areas where it shrinks and bicubic where it grows. Whatever
    else, and a JPEG large enough to shrink while decoding, goes through Pillow (bicubic). Their crops
    differ by about one grey level.

    Args:
      data: an encoded image, as in `decode_image`.
      rng: where the box comes from; the result is a function of `data` and of the state of `rng`.
      image_size: height and width of the crop in pixels.
      scale: the least and greatest part of the image's area that the box covers, drawn uniformly.
      ratio: the least and greatest width over height of the box, drawn uniformly in the logarithm.
      channels: 3 for RGB, 1 for luminance.
      exif: whether the EXIF orientation is followed, as in `center_crop`.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
    """
    height, width = image_size
    with _broken_image():
        image = _open(data)
        if image.format != "JPEG":  # which alone shrinks while decoding, and never turns itself
            image.load()
        orientation = _orientation(image) if exif else 1
        lying = orientation in _LYING
        size = (image.width, image.height) if lying else (image.height, image.width)
        box = sample_box(rng, size, scale=scale, ratio=ratio)
        # Cropped as stored, and turned when small.
        top, left, box_height, box_width = _stored_box(box, size, orientation)
        stored_size = (height, width) if lying else (width, height)
        reduction = _jpeg_reduction(image, box[2:], image_size)
        pixels = _decode_jpeg(data, image, channels) if reduction == 1 else None
        if pixels is not None:
            pixels = pixels[top : top + box_height, left : left + box_width]
            pixels = _resize(pixels, stored_size)
            if orientation == 1:
                return pixels.reshape(height, width, channels)
            image = Image.fromarray(pixels)
        elif reduction == 1:
            image = _convert(image, channels)
            image = image.crop((left, top, left + box_width, top + box_height))
            image = image.resize(stored_size, Image.Resampling.BICUBIC)
        else:
            reduced = (
                left / reduction,
                top / reduction,
                (left + box_width) / reduction,
                (top + box_height) / reduction,
            )
            image.draft(None, (image.width // reduction, image.height // reduction))
            image = _convert(image, channels)
            image = image.resize(stored_size, Image.Resampling.BICUBIC, box=reduced)
        return _pixels(_turn(image, orientation))


def sample_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the box of `random_resized_crop`.

    Ten draws are tried; if none fits, the box is the greatest centred one whose ratio is allowed.

    Args:
      rng: source of the draws.
      size: height and width of the image in pixels.
      scale: as in `random_resized_crop`.
      ratio: as in `random_resized_crop`.

    Returns:
      Top, left, height and width in pixels, inside the image.
    """
    height, width = size
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    for _ in range(_ATTEMPTS):
        area = rng.uniform(*scale) * height * width
        aspect = math.exp(rng.uniform(*log_ratio))
        box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < box_width <= width and 0 < box_height <= height:
            top = int(rng.integers(height - box_height + 1))
            left = int(rng.integers(width - box_width + 1))
            return top, left, box_height, box_width

    aspect = min(max(width / height, ratio[0]), ratio[1])
    box_width = max(1, min(width, round(height * aspect)))
    box_height = max(1, min(height, round(width / aspect)))
    return (height - box_height) // 2, (width - box_width) // 2, box_height, box_width


@contextlib.contextmanager
def _broken_image() -> Iterator[None]:
    try:
        yield
    except (MemoryError, BrokenImage):
        raise
    except Exception as error:  # Pillow's decoders report broken files in any type
        raise BrokenImage(str(error) or type(error).__name__) from error


def _open(image: bytes | Image.Image) -> Image.Image:
    """Reads the header. Not by `Image.open`, whose check of the size warns, globally or not at all."""
    if isinstance(image, bytes):
        readers = (cls for start, cls in _READERS if re.match(start, image, re.DOTALL))
        reader = next(readers, None)
        if reader is None:
            raise BrokenImage("not a JPEG, PNG or WebP image, nor a GIF, BMP or TIFF")
        image = reader(io.BytesIO(image))
    count = image.width * image.height
    if count > MAX_PIXELS:
        raise BrokenImage(
            f"{image.width:,} by {image.height:,} pixels are {count:,}, more than the limit of "
            f"{MAX_PIXELS:,}; shrink the image first"
        )
    return image


def _convert(image: Image.Image, channels: int) -> Image.Image:
    """Decodes to 8-bit RGB or luminance."""
    mode = "L" if channels == 1 else "RGB"
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _eight_bits(image)
    if image.has_transparency_data:
        image = _over_white(image)
    return image if image.mode == mode else image.convert(mode)


def _decode_jpeg(data: bytes, image: Image.Image, channels: int) -> UInt8[np.ndarray, "..."] | None:
    """The pixels by OpenCV, or None if Pillow, which has read the header, is to decode the image.

    OpenCV gives no pixels for a file that was cut short, and Pillow then says what is wrong with it.
    """
    if image.format != "JPEG" or image.mode not in ("RGB", "L"):
        return None
    import cv2

    colour = cv2.IMREAD_GRAYSCALE if channels == 1 else cv2.IMREAD_COLOR_RGB
    return cv2.imdecode(np.frombuffer(data, np.uint8), colour | cv2.IMREAD_IGNORE_ORIENTATION)


def _resize(pixels: UInt8[np.ndarray, "..."], size: tuple[int, int]) -> UInt8[np.ndarray, "..."]:
    """Resizes pixels to (width, height): the mean over areas where a side shrinks, bicubic where it grows."""
    import cv2

    height, width = pixels.shape[:2]
    # Areas antialias only while neither side grows.
    shrunk = cv2.resize(
        pixels, (min(size[0], width), min(size[1], height)), interpolation=cv2.INTER_AREA
    )
    return cv2.resize(shrunk, size, interpolation=cv2.INTER_CUBIC)


def _eight_bits(image: Image.Image) -> Image.Image:
    """Scales grey levels that are deeper than 8 bits, which Pillow would clip."""
    levels = np.asarray(image)
    if image.mode.startswith("I;16"):
        return Image.fromarray((levels >> 8).astype(np.uint8))
    # Neither integers of 32 bits nor floats say what white is: the least usual value that holds all.
    peak = levels.max(initial=0, where=np.isfinite(levels))
    usual = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    white = next((white for white in usual if peak <= white), float(peak))
    levels = np.nan_to_num(levels.astype(np.float32), nan=0.0)
    return Image.fromarray(np.rint(np.clip(levels, 0, white) * (255 / white)).astype(np.uint8))


def _over_white(image: Image.Image) -> Image.Image:
    if image.mode == "La":  # premultiplied; Pillow knows no direct way from here to RGBA
        image = image.convert("LA")
    image = image.convert("RGBA")
    canvas = Image.new("RGB", image.size, "white")
    canvas.paste(image, mask=image.getchannel("A"))
    return canvas


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, of a loaded image or an opened JPEG: 1 where it says nothing."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow's reader reports broken EXIF in any type; the picture is whole
        return 1
    return orientation if orientation in _TURNS else 1


def _turn(image: Image.Image, orientation: int) -> Image.Image:
    """Turns an image upright."""
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _stored_box(
    box: tuple[int, int, int, int], size: tuple[int, int], orientation: int
) -> tuple[int, int, int, int]:
    """Where a box (top, left, height, width) of the upright image of `size` lies as it is stored."""
    top, left, height, width = box
    if orientation in _UPSIDE_DOWN:
        top = size[0] - top - height
    if orientation in _MIRRORED:
        left = size[1] - left - width
    return (left, top, width, height) if orientation in _LYING else (top, left, height, width)


def _pixels(image: Image.Image) -> UInt8[np.ndarray, "h w c"]:
    pixels = np.array(image)
    return pixels if pixels.ndim == 3 else pixels[..., None]


def _covering_size(size: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image of `size` resized to cover `target`."""
    height, width = size
    if target[0] == target[1]:  # torchvision's Resize of the shorter side, which rounds down
        short = target[0]
        if height <= width:
            return short, int(short * width / height)
        return int(short * height / width), short
    factor = min(height / target[0], width / target[1])  # timm's ResizeKeepRatio, which rounds
    return round(height / factor), round(width / factor)


def _jpeg_reduction(image: Image.Image, box: tuple[int, int], target: tuple[int, int]) -> int:
    """The power of two by which a JPEG shrinks while decoding, so that `box` stays ample."""
    if image.format != "JPEG":
        return 1
    shrink = min(box[0] / target[0], box[1] / target[1]) / _JPEG_MARGIN
    return next((factor for factor in (8, 4, 2) if shrink >= factor), 1)
