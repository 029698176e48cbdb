"""Pixels of any depth, range and transparency as 8-bit RGB or luminance."""

from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

_EXTRA_SAMPLES = 338


def to_eight_bits(image: Image.Image, channels: int) -> Image.Image:
    """Decodes an image of Pillow's to 8-bit RGB or luminance, over white where it is transparent.

    Deeper pixels are scaled so that the format's white becomes 255. An alpha channel that is zero everywhere, in a
    file that does not declare one, is no transparency: the fourth byte of a BMP, unspecified samples of a TIFF.

    Args:
      image: opened or loaded.
      channels: 3 for RGB, 1 for luminance.

    Returns:
      The image in mode RGB or L.
    """
    mode = "L" if channels == 1 else "RGB"
    image.load()
    if image.mode == "F" or image.mode.startswith("I"):
        image = _scaled_image(image)
    if image.has_transparency_data:
        image = image.convert("RGB") if _alpha_means_nothing(image) else _over_white(image)
    return image if image.mode == mode else image.convert(mode)


def scaled(levels: Any, white: int | float, *, inverted: bool = False) -> UInt8[np.ndarray, "..."]:
    """Scales levels from [0, white] to [0, 255]; what lies outside is clipped, NaN is 0.

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
    """The white of integers of 32 bits and of floats, which do not say: the least usual one that holds all."""
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
    grey = Image.fromarray(scaled(levels, white, inverted=tags.get(262) == 0))
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
