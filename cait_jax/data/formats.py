"""The image formats that are read, by the suffixes of their files. Loads no decoder."""

import functools
import importlib.util

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
