"""Photographs to the input of a network: decoded, resized, cropped in the middle, normalised."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, UInt8

from cait_jax.data.image_files import nearest_path
from cait_jax.data.split import BrokenImage
from cait_jax.errors import UserError, nearest
from cait_jax.reading import MAX_IMAGE, read_bytes
from cait_jax.renamed import current_preprocessing

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How images become the input of a network, as in its evaluation.

    An image is turned upright by its EXIF orientation, composited over white, resized (bicubic, antialiased) to
    cover `image_size / crop_pct`, cropped in the middle and normalised to
    `(pixel / 255 - mean) / std`.

    Every method takes images as paths, as encoded bytes (the formats of `decode_image`; the first frame
    counts), as PIL images, or as arrays, uint8 (h, w), (h, w, 1), (h, w, 3) or, with an alpha
    channel, (h, w, 4).

    Attributes:
      image_size: height and width in pixels.
      crop_pct: the fraction of the shorter side that the crop keeps, in (0, 1].
      mean: of each channel, or one value for all, on a scale from 0 to 1.
      std: as `mean`.
      channels: 3 for RGB, 1 for luminance.

    Raises:
      UserError: a value is not of its kind or outside its range.
    """

    image_size: tuple[int, int]
    crop_pct: float = 1.0
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    channels: int = 3

    def __post_init__(self) -> None:
        """Checks the values, and makes tuples of lists and floats of integers."""
        for name, value in _checked(vars(self)).items():
            object.__setattr__(self, name, value)

    def __call__(self, images: Any) -> Float32[np.ndarray, "batch h w c"]:
        """The input of `model.apply`: float32 (batch, height, width, channels), normalised.

        Args:
          images: one image, or any number in a sequence, an iterator or an array (b, h, w, c).

        Raises:
          BrokenImage: an image cannot be decoded, or has more than `decode.MAX_PIXELS` pixels.
          UserError: a file cannot be read, or an object is not an image.
        """
        pixels = self.crops(images).astype(np.float32)
        mean, std = (np.array(values, np.float32) for values in (self.mean, self.std))
        shape = (1, 1, 1, -1)
        return (pixels / np.float32(255) - mean.reshape(shape)) / std.reshape(shape)

    def crops(self, images: Any) -> UInt8[np.ndarray, "batch h w c"]:
        """As a call, without normalisation: uint8 (batch, height, width, channels)."""
        if not _is_several(images):
            return self.crop(images)[None]
        crops = [self._crop(image, f"image {index}") for index, image in enumerate(images)]
        return np.array(crops, np.uint8).reshape(-1, *self.image_size, self.channels)

    def crop(self, image: Any) -> UInt8[np.ndarray, "h w c"]:
        """One image without normalisation: uint8 (height, width, channels)."""
        return self._crop(image, "the image")

    def _crop(self, image: Any, name: str) -> UInt8[np.ndarray, "h w c"]:
        from cait_jax.data.decode import center_crop

        if isinstance(image, str | Path):
            name = str(image)
        elif filename := getattr(image, "filename", ""):  # of a PIL image opened from a file
            name = str(filename)
        opened = _decodable(image, name)
        try:
            return center_crop(
                opened,
                image_size=self.image_size,
                crop_pct=self.crop_pct,
                channels=self.channels,
                exif=True,
            )
        except BrokenImage as error:
            raise BrokenImage(f"{name} cannot be decoded: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings as values of JSON; `from_dict` is the inverse."""
        values = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "Preprocessing":
        """The settings of `to_dict`: every attribute by its name.

        Raises:
          UserError: a name is missing or unknown, or a value is bad.
        """
        settings = current_preprocessing(settings)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in settings:
            if name not in names:
                raise UserError(f"preprocessing has no setting {name!r}; {nearest(name, names)}")
        if missing := [name for name in names if name not in settings]:
            raise UserError(
                f"preprocessing lacks {', '.join(missing)}; its settings are {', '.join(names)}"
            )
        return cls(**_checked(settings))


def _is_several(images: Any) -> bool:
    if isinstance(images, np.ndarray):
        return images.ndim == 4
    return isinstance(images, Iterable) and not isinstance(images, str | bytes | bytearray | Path)


def _decodable(image: Any, name: str) -> Any:
    """Brings an image of any kind to what `center_crop` takes: bytes, or an image of Pillow's."""
    from PIL import Image

    if isinstance(image, bytes | Image.Image):
        return image
    if isinstance(image, bytearray | memoryview):
        return bytes(image)
    if isinstance(image, str | Path):
        return _read(Path(image).expanduser())
    if not isinstance(image, np.ndarray):
        raise UserError(
            f"{name} is of type {type(image).__name__}; give a path, encoded bytes, a PIL image or a "
            "uint8 array"
        )
    channels = 1 if image.ndim == 2 else image.shape[-1]
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise UserError(
            f"{name} is an array of {image.dtype} {image.shape}; give uint8 of (height, width) or "
            "(height, width, channels) with 1, 3 or 4 channels"
        )
    return Image.fromarray(image[..., 0] if image.ndim == 3 and channels == 1 else image)


def _read(path: Path) -> bytes:
    try:
        return read_bytes(path, MAX_IMAGE)
    except FileNotFoundError as error:
        raise UserError(f"there is no image {path}{nearest_path(path)}") from error
    except IsADirectoryError as error:
        raise UserError(
            f"{path} is a folder; cait_jax.data.image_files.expand_images lists the images in it"
        ) from error
    except OSError as error:
        raise UserError(
            f"image {path} cannot be read: {error.strerror}; make it readable or leave it out"
        ) from error


def _checked(settings: Mapping[str, Any]) -> dict[str, Any]:
    size, crop_pct, channels = (settings[key] for key in ("image_size", "crop_pct", "channels"))
    size = tuple(size) if isinstance(size, Iterable) else (size,)
    if len(size) != 2 or not all(_is_a(int, side) and side > 0 for side in size):
        raise UserError(
            "image_size must be height and width in whole pixels, such as (224, 224), not "
            f"{settings['image_size']!r}"
        )
    crop_pct = _number("crop_pct", crop_pct)
    if not 0 < crop_pct <= 1:
        raise UserError(f"crop_pct must be above 0 and at most 1, not {crop_pct}")
    if channels not in (1, 3):
        raise UserError(f"channels must be 3 (RGB) or 1 (luminance), not {channels!r}")
    mean, std = (_by_channel(name, settings[name], channels) for name in ("mean", "std"))
    if min(std) <= 0:
        raise UserError(f"std must be above 0, not {std}")
    return {
        "image_size": tuple(map(int, size)), "crop_pct": crop_pct, "mean": mean, "std": std, "channels": channels,
    }  # fmt: skip


def _by_channel(name: str, value: Any, channels: int) -> tuple[float, ...]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise UserError(f"{name} must be a tuple of one number, or of one a channel, not {value!r}")
    numbers = tuple(_number(name, number) for number in value)
    if len(numbers) not in (1, channels):
        raise UserError(
            f"{name} has {len(numbers)} values, but images have {channels} "
            f"channel{'s' * (channels > 1)}; give one value, or one a channel"
        )
    return numbers


def _number(name: str, value: Any) -> float:
    try:
        number = float(value) if _is_a(float, value) else math.nan
    except OverflowError:  # an integer of more than 308 digits
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} takes finite numbers, not {repr(value)[:80]}")
    return number


def _is_a(kind: type, value: Any) -> bool:
    """Whether a value is a number that `kind` holds: Python's or NumPy's, but not a bool."""
    numbers = (int, np.integer) if kind is int else (int, float, np.integer, np.floating)
    return isinstance(value, numbers) and not isinstance(value, bool)
