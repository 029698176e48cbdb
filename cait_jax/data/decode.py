"""Encoded images (JPEG, PNG, WebP) to uint8 crops, in the arithmetic of torchvision and timm.

EXIF orientation is ignored, as it is there: published weights were trained and scored without it.
"""

import contextlib
import io
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from cait_jax.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP")
_ATTEMPTS = 10
# A JPEG is shrunk while decoding only as far as the box stays this many times the crop. The crop is
# then about half a grey level from one of the full image, against up to two with no margin.
_JPEG_MARGIN = 2


class BrokenImage(UserError):
    """The bytes are no image that can be decoded."""


def decode_image(data: bytes, *, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a whole image.

    Args:
      data: an encoded JPEG, PNG or WebP image of any colour mode.
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The pixels, uint8 (height, width, channels).

    Raises:
      BrokenImage: the bytes cannot be decoded.
    """
    with _broken_image():
        return _pixels(_convert(_open(data), channels))


def center_crop(
    data: bytes, *, image_size: tuple[int, int], crop_ratio: float = 1.0, channels: int = 3
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image for evaluation: resized to cover, then cropped in the middle.

    The image is resized (bicubic, antialiased) so that it just covers `image_size / crop_ratio`,
    rounded down.

    Args:
      data: an encoded JPEG, PNG or WebP image of any colour mode.
      image_size: height and width of the crop in pixels.
      crop_ratio: the part of the shorter side that the crop keeps, in (0, 1].
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the bytes cannot be decoded.
    """
    height, width = image_size
    with _broken_image():
        image = _convert(_open(data), channels)
        resized = _covering_size(
            (image.height, image.width),
            (math.floor(height / crop_ratio), math.floor(width / crop_ratio)),
        )
        image = image.resize((resized[1], resized[0]), Image.Resampling.BICUBIC)
        top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
        return _pixels(image.crop((left, top, left + width, top + height)))


def random_resized_crop(
    data: bytes,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    scale: tuple[float, float] = (0.08, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
    channels: int = 3,
) -> UInt8[np.ndarray, "h w c"]:
    """Decodes an image for training: a random box of it, resized (bicubic, antialiased).

    Args:
      data: an encoded JPEG, PNG or WebP image of any colour mode.
      rng: where the box comes from; the result is a function of `data` and of the state of `rng`.
      image_size: height and width of the crop in pixels.
      scale: the least and greatest part of the image's area that the box covers, drawn uniformly.
      ratio: the least and greatest width over height of the box, drawn uniformly in the logarithm.
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The crop, uint8 (image_size[0], image_size[1], channels).

    Raises:
      BrokenImage: the bytes cannot be decoded.
    """
    height, width = image_size
    with _broken_image():
        image = _open(data)
        top, left, box_height, box_width = sample_box(
            rng, (image.height, image.width), scale=scale, ratio=ratio
        )
        reduction = _jpeg_reduction(image, (box_height, box_width), image_size)
        if reduction == 1:
            image = _convert(image.crop((left, top, left + box_width, top + box_height)), channels)
            return _pixels(image.resize((width, height), Image.Resampling.BICUBIC))
        reduced = (
            left / reduction,
            top / reduction,
            (left + box_width) / reduction,
            (top + box_height) / reduction,
        )
        image.draft(None, (image.width // reduction, image.height // reduction))
        image = _convert(image, channels)
        return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=reduced))


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
    except MemoryError:
        raise
    except Exception as error:  # Pillow's decoders report broken files in any type
        reason = (
            "not a JPEG, PNG or WebP image"
            if isinstance(error, Image.UnidentifiedImageError)
            else str(error) or type(error).__name__
        )
        raise BrokenImage(reason) from error


def _open(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data), formats=_FORMATS)


def _convert(image: Image.Image, channels: int) -> Image.Image:
    mode = "L" if channels == 1 else "RGB"
    image.load()
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip to 8
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    image.info.pop("transparency", None)
    return image if image.mode == mode else image.convert(mode)


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
