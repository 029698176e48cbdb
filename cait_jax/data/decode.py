"""Encoded images to uint8 crops, in the arithmetic of torchvision and timm.

Every image becomes 8-bit RGB or luminance: transparency is composited over white, deeper pixels are scaled. EXIF
orientation is applied only where asked for: published scores of data sets were measured without it.

Pillow decodes in training, evaluation and prediction, so what is broken in one is broken in all. It never sees
metadata, for it refuses a whole picture for one bad comment. JPEGs are opened here, all else in `opening`.
"""

import contextlib
import functools
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator

import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image, JpegImagePlugin

from cait_jax.data import opening
from cait_jax.data.split import BrokenImage, InMemory, Split
from cait_jax.errors import UserError, nearest

MAX_PIXELS = 89_478_485
"""The most pixels an image may have: 256 MiB of RGB, as Pillow's own default. More is refused undecoded."""
RESIZES = ("exact", "fast")
"""How training resizes: Pillow's antialiased bicubic, or OpenCV's approximation of it."""

_ATTEMPTS = 10
# In fast crops a JPEG is shrunk while decoding only as far as the box stays this many times the crop.
_JPEG_MARGIN = 2
_PADDING = 4
_SILENT = ("ignore", None, UserWarning, re.compile(r"PIL\."), 0)
_DAMAGED = "it is damaged or cut short"
# Messages of Pillow that do not help.
_REASONS = {
    "not identified by this driver": "its header is damaged or cut short",
    "could not create decoder object": _DAMAGED,
    "decoder error -2": _DAMAGED,
}
_START_OF_SCAN, _JPEG_LS = 0xDA, 0xF7
_START_OF_FRAME = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}


def decode_image(data: bytes, *, channels: int = 3) -> UInt8[np.ndarray, "h w c"]:
    """Decodes a whole image, ignoring its EXIF orientation.

    Args:
      data: an encoded JPEG, PNG, WebP, GIF, BMP, TIFF or PPM image of any colour mode and depth, AVIF where
        Pillow has it, HEIF where pillow-heif is installed; of an animation, the first frame.
      channels: 3 for RGB, 1 for luminance.

    Raises:
      BrokenImage: the bytes cannot be decoded, or hold more than `MAX_PIXELS` pixels.
    """
    with _broken_image():
        return _pixels(_decoded(_open(data), channels))


def read_header(data: bytes) -> None:
    """Reads the header of an image, or of a beginning of one that is long enough for its format.

    Raises:
      BrokenImage: it has none that can be read, or promises more than `MAX_PIXELS` pixels.
    """
    with _broken_image():
        _open(data)


def read_size(data: bytes) -> tuple[int, int]:
    """Height and width of an image as stored, from its header.

    Raises:
      BrokenImage: as of `read_header`.
    """
    with _broken_image():
        image = _open(data)
        return image.height, image.width


def center_crop(
    image: bytes | Image.Image,
    *,
    image_size: tuple[int, int],
    crop_pct: float = 1.0,
    channels: int = 3,
    exif: bool = False,
) -> UInt8[np.ndarray, "h w c"]:
    """The crop of evaluation: resized (bicubic, antialiased) to just cover `image_size / crop_pct`, then centred.

    Args:
      image: encoded as for `decode_image`, or opened by Pillow.
      image_size: height and width of the crop in pixels.
      crop_pct: the fraction of the shorter side that the crop keeps, in (0, 1].
      channels: 3 for RGB, 1 for luminance.
      exif: whether the EXIF orientation is applied, as for photographs. TIFF and HEIF are always upright.

    Raises:
      BrokenImage: as of `decode_image`.
    """
    height, width = image_size
    with _broken_image():
        image = _decoded(_open(image), channels, exif)
        target = (math.floor(height / crop_pct), math.floor(width / crop_pct))
        resized = _covering_size((image.height, image.width), target)
        top, left = round((resized[0] - height) / 2), round((resized[1] - width) / 2)
        if math.prod(resized) > MAX_PIXELS:  # a hair of an image: only what is kept is enlarged
            across, down = image.width / resized[1], image.height / resized[0]
            box = (left * across, top * down, (left + width) * across, (top + height) * down)
            return _pixels(image.resize((width, height), Image.Resampling.BICUBIC, box=box))
        image = image.resize(resized[::-1], Image.Resampling.BICUBIC)
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
    """The crop of training: a random box of the image, resized (antialiased).

    `"exact"` is Pillow's bicubic, as timm has it. `"fast"` makes 1.25 times as many crops in the same time
    (`benchmarks/input.py`): OpenCV takes means over areas where a side shrinks and bicubic where it grows, and a
    JPEG that is shrunk by 4 or more is shrunk by 2, 4 or 8 while it is decoded. In 224-pixel crops of ImageNet it
    is 1.0 grey level from exact on average, 7 at the 99th percentile and 50 at most.

    Args:
      scale: least and greatest fraction of the image's area that the box covers, drawn uniformly.
      ratio: least and greatest width over height of the box, drawn uniformly in the logarithm.
      resize: one of `RESIZES`.

    Raises:
      BrokenImage: as of `decode_image`.
      UserError: `resize` is unknown.
    """
    with _broken_image():
        image = _open(data)
        if image.format != "JPEG":  # which alone shrinks while decoding, and never turns itself
            image.load()
        orientation = opening.exif_orientation(image) if exif else 1
        on_its_side = orientation > 4
        size = image.size if on_its_side else image.size[::-1]
        box = sample_box(rng, size, scale=scale, ratio=ratio)
        # Cropped as stored, and turned when small.
        stored = box if orientation == 1 else opening.stored_box(box, size, orientation)
        top, left, height, width = stored
        stored_size = image_size if on_its_side else image_size[::-1]
        edges = (left, top, left + width, top + height)
        reduction = _jpeg_reduction(image, box[2:], image_size) if resize == "fast" else 1
        if reduction > 1:
            image.draft(None, (image.width // reduction, image.height // reduction))
            x0, y0, x1, y1 = (edge / reduction for edge in edges)
            image = _decoded(image, channels)
            image = image.resize(stored_size, Image.Resampling.BICUBIC, box=(x0, y0, x1, y1))
        else:
            image = _resize(_decoded(image, channels).crop(edges), stored_size, resize)
        return _pixels(image if orientation == 1 else opening.turned(image, orientation))


def simple_random_crop(
    data: bytes,
    rng: np.random.Generator,
    *,
    image_size: tuple[int, int],
    channels: int = 3,
    exif: bool = False,
    resize: str = "exact",
) -> UInt8[np.ndarray, "h w c"]:
    """DeiT III's crop of training (Touvron et al., arXiv 2204.07118, section 3).

    The image is resized to just cover the crop, reflected by 4 pixels on every side, and cropped uniformly.
    Arguments and errors are as for `random_resized_crop`.
    """
    height, width = image_size
    with _broken_image():
        image = _decoded(_open(data), channels, exif)
        resized = _covering_size((image.height, image.width), image_size)
        if math.prod(resized) > MAX_PIXELS:  # a hair of an image: of its length, twice its width
            part_width, part_height = (min(side, 2 * min(image.size)) for side in image.size)
            left = int(rng.integers(image.width - part_width + 1))
            top = int(rng.integers(image.height - part_height + 1))
            image = image.crop((left, top, left + part_width, top + part_height))
            resized = _covering_size((image.height, image.width), image_size)
        pixels = _pixels(_resize(image, resized[::-1], resize))
        top = int(rng.integers(resized[0] + 2 * _PADDING - height + 1))
        left = int(rng.integers(resized[1] + 2 * _PADDING - width + 1))
        padded = np.pad(pixels, ((_PADDING, _PADDING), (_PADDING, _PADDING), (0, 0)), "reflect")
        return padded[top : top + height, left : left + width]


def crop_from_config(config: ConfigDict, split: Split) -> Callable[..., UInt8[np.ndarray, "h w c"]]:
    """The crop of `train_batches`.

    Raises:
      UserError: images in memory are asked to be cropped while they are decoded.
    """
    augment, resize = config.augment, config.data.resize
    if not augment.simple_crop:
        scale, ratio = tuple(augment.scale), tuple(augment.ratio)
        return functools.partial(random_resized_crop, scale=scale, ratio=ratio, resize=resize)
    if isinstance(split, InMemory):
        raise UserError(
            "--config.augment.simple_crop crops images as they are decoded, and those of "
            f"{config.data.name} are in memory: set it to False and use --config.augment.pad_crop=4"
        )
    return functools.partial(simple_random_crop, resize=resize)


def sample_box(
    rng: np.random.Generator,
    size: tuple[int, int],
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws the box of `random_resized_crop` in an image of `size` (height, width).

    If none of ten draws fits, it is the greatest centred box whose ratio is allowed.

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
    except (MemoryError, UserError):
        raise
    except Exception as error:  # Pillow's decoders report broken files in any type
        raise BrokenImage(_REASONS.get(str(error), str(error)) or type(error).__name__) from error


def _open(image: bytes | Image.Image) -> Image.Image:
    """Reads the header, without `Image.open`, which guesses formats and checks the size by a global."""
    # `warnings.catch_warnings` is not thread-safe, so the filter stays; it is put back where it was removed.
    if warnings.filters[:1] != [_SILENT]:
        warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    if isinstance(image, bytes):
        if not image.startswith(b"\xff\xd8\xff"):
            return opening.open_image(image, _check_size)
        image = JpegImagePlugin.JpegImageFile(io.BytesIO(_without_metadata(image)))
    _check_size(image.size)
    return image


def _check_size(size: tuple[int, int]) -> None:
    count = size[0] * size[1]
    if count > MAX_PIXELS:
        raise BrokenImage(
            f"{size[0]:,} by {size[1]:,} pixels are {count:,}, more than the limit of {MAX_PIXELS:,}; shrink the "
            "image first"
        )


def _without_metadata(jpeg: bytes) -> bytes:
    """Leaves out segments that hold neither pixels nor their colour space or orientation."""
    kept, at = [jpeg[:2]], 2
    while (
        len(jpeg) >= at + 4 and jpeg[at] == 0xFF and jpeg[at + 1] not in (0, 0xFF, _START_OF_SCAN)
    ):
        marker, end = jpeg[at + 1], at + 2 + int.from_bytes(jpeg[at + 2 : at + 4])
        content = jpeg[at + 4 : end]
        if marker in _START_OF_FRAME and content[:1] not in (b"", b"\x08"):
            raise BrokenImage(
                f"a JPEG of {content[0]} bits a sample, which cannot be read; save it with 8 bits"
            )
        if marker == _JPEG_LS:
            raise BrokenImage("a JPEG-LS, which cannot be read; save it as PNG")
        if end > len(jpeg) or _is_needed(marker, content):
            kept.append(jpeg[at:end])
        at = end
    return b"".join([*kept, jpeg[at:]])


def _is_needed(marker: int, content: bytes) -> bool:
    match marker:
        case 0xE0:  # JFIF
            return len(content) >= 14
        case 0xE1:
            return content.startswith(b"Exif\0\0")
        case 0xEE:  # Adobe's colour transform
            return len(content) >= 12
    return not 0xE0 <= marker <= 0xEF and marker != 0xFE  # of applications, and comments


def _decoded(image: Image.Image, channels: int, exif: bool = False) -> Image.Image:
    """The image in mode RGB or L, upright by its EXIF orientation if asked for."""
    image.load()
    converted = image
    if image.has_transparency_data or image.mode == "F" or image.mode.startswith("I"):
        converted = opening.to_opaque_eight_bits(image)
    mode = "L" if channels == 1 else "RGB"
    if converted.mode != mode:  # or it would be copied
        converted = converted.convert(mode)
    return opening.turned(converted, opening.exif_orientation(image)) if exif else converted


def _resize(image: Image.Image, size: tuple[int, int], resize: str) -> Image.Image:
    """Resizes to (width, height)."""
    if resize not in RESIZES:
        raise UserError(f"resize is {resize!r}; {nearest(resize, RESIZES)}")
    if resize == "exact":
        return image.resize(size, Image.Resampling.BICUBIC)
    import cv2

    # Areas antialias only while neither side grows.
    shrunk = (min(size[0], image.width), min(size[1], image.height))
    pixels = cv2.resize(np.asarray(image), shrunk, interpolation=cv2.INTER_AREA)
    return Image.fromarray(cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC))


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
