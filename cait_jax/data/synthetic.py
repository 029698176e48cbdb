"""Made-up images for measuring speed: no disk, nothing to learn, the same on every machine."""

import functools
import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cait_jax.data.sources import Encoded, InMemory
from cait_jax.errors import UserError, nearest

NAMES = ("synthetic", "synthetic/jpeg")
SPLITS = ("train", "validation")
NUM_CLASSES = 1000
# As many examples as ImageNet-1k has, and its usual size: 110 kB for 400 by 500 pixels.
JPEG_COUNTS = {"train": 1_281_167, "validation": 50_000}
JPEG_SIZE = (400, 500)
_COUNTS = {"train": 4096, "validation": 1024}
_PICTURES = 64
_QUALITY = 92
_FADING = 1.2
_CLASS_NAMES = tuple(str(number) for number in range(NUM_CLASSES))


@dataclass(frozen=True)
class SyntheticJpegs:
    """Records of JPEG files that hold noise with the spectrum of photographs.

    Of `_PICTURES` different files, each is encoded once in a process that asks for it; record `i` has file
    `i % _PICTURES`. Labels are 0 to 999 in turn.
    """

    count: int

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """The encoded `image` and its `label`."""
        if not 0 <= index < self.count:
            raise IndexError(index)
        return {"image": _jpeg(index % _PICTURES), "label": index % NUM_CLASSES}


def load_synthetic(
    name: str, split: str, image_size: tuple[int, int], max_bytes: int
) -> InMemory | Encoded:
    """Makes a split of 1,000 classes.

    Args:
      name: `"synthetic"`: uniform noise of the size asked for, in memory; `"synthetic/jpeg"`: JPEG files
        of ImageNet's usual size and number, to be decoded like it.
      split: `"train"` or `"validation"`.
      image_size: height and width in pixels of the images in memory.
      max_bytes: what the images in memory may take; of very large ones there are fewer.

    Raises:
      UserError: the name or the split is unknown, or not one image fits.
    """
    if name not in NAMES:
        raise UserError(f"unknown synthetic data {name!r}; {nearest(name, NAMES)}")
    if split not in SPLITS:
        raise UserError(f"{name} has no split {split!r}; {nearest(split, SPLITS)}")
    if name == "synthetic/jpeg":
        return Encoded(SyntheticJpegs(JPEG_COUNTS[split]), _CLASS_NAMES, channels=3)

    shape = (*image_size, 3)
    count = min(_COUNTS[split], max_bytes // int(np.prod(shape)))
    if not count:
        raise UserError(
            f"an image of {image_size[0]} by {image_size[1]} pixels is too large for {name}"
        )
    words = np.random.Philox(SPLITS.index(split)).random_raw(-(-count * int(np.prod(shape)) // 8))
    images = words.view(np.uint8)[: count * int(np.prod(shape))].reshape(count, *shape)
    labels = np.arange(count, dtype=np.int32) % NUM_CLASSES
    return InMemory(images, labels, _CLASS_NAMES)


@functools.lru_cache(maxsize=_PICTURES)
def _jpeg(number: int) -> bytes:
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(_picture(number)).save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()


def _picture(number: int) -> UInt8[np.ndarray, "h w 3"]:
    """Noise of eight octaves, the fainter the finer."""
    from PIL import Image

    height, width = JPEG_SIZE
    total = np.zeros((height, width, 3), np.float32)
    for octave in range(8):
        cells = (width * 2**octave // 128 + 2, height * 2**octave // 128 + 2)
        shape = (cells[1], cells[0], 3)
        words = np.random.Philox(key=[number, octave]).random_raw(int(np.prod(shape)))
        noise = Image.fromarray((words >> 56).astype(np.uint8).reshape(shape))
        grown = noise.resize((width, height), Image.Resampling.BICUBIC)
        total += (np.asarray(grown, np.float32) - 127.5) / _FADING**octave
    return np.clip(total / 1.5 + 127.5, 0, 255).astype(np.uint8)
