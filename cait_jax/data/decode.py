"""Encoded images to uint8 crops, in the arithmetic of torchvision and timm.

Every image becomes 8-bit RGB or luminance: transparency lies over white, deeper pixels are scaled. EXIF
orientation is followed only where asked for: published scores of data sets were made without it.

Pillow decodes in training, evaluation and prediction, so what is broken in one is broken in all.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image

from cait_jax.data.formats import SUFFIXES, missing_decoder
from cait_jax.data.levels import to_eight_bits
from cait_jax.data.opening import BrokenImage, check_pixels, open_image, silence_warnings
from cait_jax.errors import UserError, nearest

__all__ = [
    "MAX_PIXELS",
    "RESIZES",
    "SUFFIXES",
    "BrokenImage",
    "center_crop",
    "decode_image",
    "missing_decoder",
    "random_resized_crop",
    "read_header",
    "sample_box",
    "simple_random_crop",
]

MAX_PIXELS = 89_478_485
"""The most pixels an image may have: 256 MiB of RGB, as Pillow's own default. More is refused unread."""
RESIZES = ("exact", "fast")
"""How training resizes: Pillow's antialiased bicubic, or OpenCV's approximation of it."""

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
# In fast crops a JPEG is shrunk while decoding only as far as the box stays this many times the crop.
_JPEG_MARGIN = 2
_PADDING = 4
_DAMAGED = "it is damaged or cut short"
# What Pillow says without saying anything.
_REASONS = {
    "not identified by this driver": "its header is damaged or cut short",
    "could not create decoder object": _DAMAGED,
    "decoder error -2": _DAMAGED,
}


def decode_image(data: bytes, *, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a whole image, ignoring its EXIF orientation.

    Args:
      data: an encoded JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image of any colour mode and depth, AVIF where
        Pillow has it, HEIF where pillow-heif is installed; of an animation, the first frame counts.
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The pixels, uint8 (height, width, channels).

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
    """
    with _broken_image():
        return _pixels(to_eight_bits(_open(data), channels))


def read_header(data: bytes) -> None:
    """Reads an image's header and no pixels.

    Args:
      data: the image, or a beginning of it that is long enough for its format.

    Raises:
      BrokenImage: it has none that can be read, or promises more than `MAX_PIXELS` pixels.
    """
    with _broken_image():
        _open(data)


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
      exif: whether the EXIF orientation is followed, as for photographs. TIFF and HEIF always stand
        upright.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the image cannot be decoded, or has more than `MAX_PIXELS` pixels.
    """
    height, width = image_size
    with _broken_image():
        image = _open(image)
        converted = to_eight_bits(image, channels)
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
    resize: str = "exact",
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image for training: a random box of it, resized (antialiased).

    `"exact"` is Pillow's bicubic, as timm has it. `"fast"` makes 1.25 times as many crops in the same time
    (`benchmarks/input.py`): OpenCV takes means over areas where a side shrinks and bicubic where it grows, and a
    JPEG that is shrunk by 4 or more is shrunk by 2, 4 or 8 while it is decoded. In 224-pixel crops of ImageNet it
    is 1.0 grey level from exact on average, 7 at the 99th percentile and 50 at most.

    Args:
      data: an encoded image, as in `decode_image`.
      rng: where the box comes from; the result is a function of `data` and of the state of `rng`.
      image_size: height and width of the crop in pixels.
      scale: the least and greatest part of the image's area that the box covers, drawn uniformly.
      ratio: the least and greatest width over height of the box, drawn uniformly in the logarithm.
      channels: 3 for RGB, 1 for luminance.
      exif: whether the EXIF orientation is followed, as in `center_crop`.
      resize: one of `RESIZES`.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
      UserError: `resize` is unknown.
    """
    _check_resize(resize)
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
        edges = (left, top, left + box_width, top + box_height)
        reduction = _jpeg_reduction(image, box[2:], image_size) if resize == "fast" else 1
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
            image = to_eight_bits(image, channels)
            x0, y0, x1, y1 = (edge / reduction for edge in edges)
            image = image.resize(stored_size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
            pixels = _pixels(image)
        else:
            pixels = _resize(to_eight_bits(image, channels).crop(edges), stored_size, resize)
        if orientation == 1:
            return pixels
        image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        return _pixels(_turn(image, orientation))


def simple_random_crop(
    data: bytes,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    exif: bool = False,
    resize: str = "exact",
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image for training: the shorter side resized to the crop, then a random crop.

    The resized image (antialiased bicubic) is reflected by 4 pixels on every side before the crop is drawn from
    it uniformly: DeiT III's simple random crop (Touvron et al., arXiv 2204.07118, section 3).

    Args:
      data: an encoded image, as in `decode_image`.
      rng: where the crop's place comes from.
      image_size: height and width of the crop in pixels; the image is resized to just cover them.
      channels: 3 for RGB, 1 for luminance.
      exif: whether the EXIF orientation is followed, as in `center_crop`.
      resize: one of `RESIZES`.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
      UserError: `resize` is unknown.
    """
    _check_resize(resize)
    height, width = image_size
    with _broken_image():
        image = _open(data)
        converted = to_eight_bits(image, channels)
        image = _turn(converted, _orientation(image) if exif else 1)
        resized = _covering_size((image.height, image.width), image_size)
        if math.prod(resized) > MAX_PIXELS:  # a hair of an image: of its length, twice its width
            image = _random_part(image, rng)
            resized = _covering_size((image.height, image.width), image_size)
        pixels = _resize(image, resized[::-1], resize)
        top = int(rng.integers(resized[0] + 2 * _PADDING - height + 1))
        left = int(rng.integers(resized[1] + 2 * _PADDING - width + 1))
        sides = (_PADDING, _PADDING)
        padded = np.pad(pixels, (sides, sides, (0, 0)), "reflect")
        return padded[top : top + height, left : left + width]


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
        raise BrokenImage(_REASONS.get(str(error), str(error)) or type(error).__name__) from error


def _open(image: bytes | Image.Image) -> Image.Image:
    """Reads the header."""
    if isinstance(image, bytes):
        return open_image(image, MAX_PIXELS)
    silence_warnings()
    check_pixels(image.size, MAX_PIXELS)
    return image


def _check_resize(resize: str) -> None:
    if resize not in RESIZES:
        raise UserError(f"resize is {resize!r}; {nearest(resize, RESIZES)}")


def _random_part(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    width, height = (min(side, 2 * min(image.size)) for side in image.size)
    left, top = (
        int(rng.integers(image.width - width + 1)),
        int(rng.integers(image.height - height + 1)),
    )
    return image.crop((left, top, left + width, top + height))


def _resize(image: Image.Image, size: tuple[int, int], resize: str) -> UInt8[np.ndarray, "h w c"]:
    """Resizes to (width, height)."""
    if resize == "exact":
        return _pixels(image.resize(size, Image.Resampling.BICUBIC))
    import cv2

    pixels = np.asarray(image)
    # Areas antialias only while neither side grows.
    shrunk = (min(size[0], image.width), min(size[1], image.height))
    pixels = cv2.resize(pixels, shrunk, interpolation=cv2.INTER_AREA)
    pixels = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    return pixels.reshape(size[1], size[0], -1)


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
    if image.format != "JPEG" or not getattr(image, "quantization", None):  # lossless has no DCT
        return 1
    shrink = min(box[0] / target[0], box[1] / target[1]) / _JPEG_MARGIN
    return next((factor for factor in (8, 4, 2) if shrink >= factor), 1)
