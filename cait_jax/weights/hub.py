"""The released weights: where they are on the Hugging Face hub, how they are downloaded, what they score."""

import dataclasses
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cait_jax.errors import Literal, UserError, nearest, setting
from cait_jax.files import sha256
from cait_jax.models.variants import VARIANTS
from cait_jax.weights.hub_files import fetch_file
from cait_jax.weights.pins import VARIABLE, Pin, ask_for_pins, find_pin

_log = logging.getLogger(__name__)
_FILE = "model.safetensors"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclasses.dataclass(frozen=True)
class Released:
    """One set of released weights.

    Attributes:
      name: of the model, as timm has it: with the tag of the weights, if they are not its default.
      hub_id: repository on the Hugging Face hub, which holds `model.safetensors`.
      image_size: side in pixels of the images it was evaluated on.
      crop_pct: side of the centre crop over the short side of the resized image.
      top1: on ImageNet-1k's validation images in percent, with this size and crop; None if not published.
      source: of `top1`.
      mean: of each channel, on a scale from 0 to 1.
      std: on the same scale.
      revision: commit of the repository; empty: that of its pin, or the newest.
      sha256: of the file, in hexadecimal; empty: that of its pin, or not checked.
    """

    name: str
    hub_id: str
    image_size: int
    crop_pct: float
    top1: float | None
    source: str
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    revision: str = ""
    sha256: str = ""

    def preprocessing(self) -> dict[str, Any]:
        """The settings of its preprocessing."""
        return {
            "image_size": [self.image_size, self.image_size],
            "crop_pct": self.crop_pct,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": 3,
        }


@dataclasses.dataclass(frozen=True)
class Result:
    """A published accuracy, `top1` in percent, and who measured it."""

    top1: float
    source: str


# results/results-imagenet.csv of huggingface/pytorch-image-models, at the same size and crop.
_TIMM_MEASURED = "timm's measurement"
_DEIT_PAPER = "DeiT paper, arXiv 2012.12877"
_HALF = (0.5, 0.5, 0.5)
_DISTILLED, _IN1K, _AUGREG = "fb_dist_in1k", "fb_in1k", "augreg_in21k_ft_in1k"
_IN22K = "fb_in22k_ft_in1k"

# Name, tag of the hub's repository, image size, crop ratio, top-1.
_MEASURED_BY_TIMM = (
    ("cait_xxs24_224", _DISTILLED, 224, 1.0, 78.400),
    ("cait_xxs24_384", _DISTILLED, 384, 1.0, 80.954),
    ("cait_xxs36_224", _DISTILLED, 224, 1.0, 79.750),
    ("cait_xxs36_384", _DISTILLED, 384, 1.0, 82.204),
    ("cait_xs24_384", _DISTILLED, 384, 1.0, 84.064),
    ("cait_s24_224", _DISTILLED, 224, 1.0, 83.484),
    ("cait_s24_384", _DISTILLED, 384, 1.0, 85.048),
    ("cait_s36_384", _DISTILLED, 384, 1.0, 85.458),
    ("cait_m36_384", _DISTILLED, 384, 1.0, 86.060),
    ("cait_m48_448", _DISTILLED, 448, 1.0, 86.480),
    ("deit_tiny_patch16_224", _IN1K, 224, 0.9, 72.172),
    ("deit_small_patch16_224", _IN1K, 224, 0.9, 79.844),
    ("deit_base_patch16_224", _IN1K, 224, 0.9, 81.992),
    ("deit_tiny_distilled_patch16_224", _IN1K, 224, 0.9, 74.500),
    ("deit_small_distilled_patch16_224", _IN1K, 224, 0.9, 81.218),
    ("deit_base_distilled_patch16_224", _IN1K, 224, 0.9, 83.386),
    ("vit_base_patch16_224", _AUGREG, 224, 0.9, 84.532),
    ("vit_large_patch16_224", _AUGREG, 224, 0.9, 85.834),
    ("vit_tiny_patch16_224", _AUGREG, 224, 0.9, 75.452),
    ("vit_small_patch16_224", _AUGREG, 224, 0.9, 81.402),
    ("vit_base_patch16_384", _AUGREG, 384, 1.0, 86.010),
    ("deit3_small_patch16_224", _IN1K, 224, 0.9, 81.382),
    ("deit3_small_patch16_384", _IN1K, 384, 1.0, 83.432),
    ("deit3_medium_patch16_224", _IN1K, 224, 0.9, 83.090),
    ("deit3_base_patch16_224", _IN1K, 224, 0.9, 83.800),
    ("deit3_base_patch16_384", _IN1K, 384, 1.0, 85.088),
    ("deit3_large_patch16_224", _IN1K, 224, 0.9, 84.772),
    ("deit3_large_patch16_384", _IN1K, 384, 1.0, 85.820),
    (f"deit3_small_patch16_224.{_IN22K}", "", 224, 1.0, 83.082),
    (f"deit3_small_patch16_384.{_IN22K}", "", 384, 1.0, 84.846),
    (f"deit3_medium_patch16_224.{_IN22K}", "", 224, 1.0, 84.550),
    (f"deit3_base_patch16_224.{_IN22K}", "", 224, 1.0, 85.728),
    (f"deit3_base_patch16_384.{_IN22K}", "", 384, 1.0, 86.742),
    (f"deit3_large_patch16_224.{_IN22K}", "", 224, 1.0, 86.990),
    (f"deit3_large_patch16_384.{_IN22K}", "", 384, 1.0, 87.736),
)
# Networks without a head: name with the tag of the hub's repository, image size, crop ratio.
_WITHOUT_HEAD = (
    ("vit_small_patch16_224.dino", 224, 0.9),
    ("vit_small_patch8_224.dino", 224, 0.9),
    ("vit_base_patch16_224.dino", 224, 0.9),
    ("vit_base_patch8_224.dino", 224, 0.9),
    ("vit_base_patch16_224.mae", 224, 0.9),
    ("vit_large_patch16_224.mae", 224, 0.9),
    *(
        (f"vit_{size}_patch14{registers}_dinov2.lvd142m", 518, 1.0)
        for registers in ("", "_reg4")
        for size in ("small", "base", "large", "giant")
    ),
)

RELEASED: Mapping[str, Released] = {
    name: Released(
        name, f"timm/{name}.{tag}".rstrip("."), size, crop, top1, _TIMM_MEASURED,
        mean=_HALF if tag == _AUGREG else IMAGENET_MEAN,
        std=_HALF if tag == _AUGREG else IMAGENET_STD,
    )
    for name, tag, size, crop, top1 in _MEASURED_BY_TIMM
} | {
    # The teacher of DeiT and CaiT, at the resolution it teaches and was trained at, with the crop of DeiT's
    # code. (timm measures it at 288 pixels, where it has 83.690 with a crop of 1.0.)
    "regnety_160": Released(
        "regnety_160", "timm/regnety_160.deit_in1k", 224, 0.875, 82.9, _DEIT_PAPER
    )
} | {
    name: Released(name, f"timm/{name}", size, crop, None, "")
    for name, size, crop in _WITHOUT_HEAD
}  # fmt: skip

# Trained at 224 pixels without distillation.
_CAIT_TOP1 = {
    "cait_xxs24": 77.6,
    "cait_xxs36": 79.1,
    "cait_xs24": 81.8,
    "cait_xs36": 82.6,
    "cait_s24": 82.7,
    "cait_s36": 83.3,
    "cait_s48": 83.5,
    "cait_m24": 83.4,
    "cait_m36": 83.8,
}
# Trained for 300 epochs, evaluated with a crop of 0.875.
_DEIT_TOP1 = {
    "deit_tiny": 72.2,
    "deit_small": 79.9,
    "deit_base": 81.8,
    "deit_tiny_distilled": 74.5,
    "deit_small_distilled": 81.2,
    "deit_base_distilled": 83.4,
}


def find_released(name: str) -> Released:
    """The released weights of a named model.

    Raises:
      UserError: the name is unknown, or no weights were released under it (naming those of the same architecture).
    """
    if name in RELEASED:
        return RELEASED[name]
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, {*VARIANTS, *RELEASED})}")
    variant, size = VARIANTS[name], VARIANTS[name].attributes["image_size"]
    same = [
        other
        for other in RELEASED
        if other in VARIANTS
        and VARIANTS[other].family == variant.family
        and {**VARIANTS[other].attributes, "image_size": size} == variant.attributes
    ]
    if same:
        raise UserError(
            f"no weights were released as {name}; the same architecture was as {' and '.join(same)}, "
            f"which can be loaded with another {setting('image_size')}"
        )
    raise UserError(
        f"no weights were released for {name}: give {setting('weights', Literal('PATH'))}, or choose one of "
        f"{', '.join(sorted(RELEASED))}"
    )


def published_result(name: str) -> Result | None:
    """A named model's ImageNet-1k accuracy: that of its released weights, else that of its paper, else None."""
    if name in RELEASED:
        row = RELEASED[name]
        return None if row.top1 is None else Result(row.top1, row.source)
    if name in _CAIT_TOP1:
        return Result(_CAIT_TOP1[name], "CaiT paper, without distillation")
    return Result(_DEIT_TOP1[name], _DEIT_PAPER) if name in _DEIT_TOP1 else None


def download(released: Released) -> Path:
    """The `.safetensors` file of released weights, downloaded unless the hub's cache holds it. Read-only.

    `huggingface_hub` does the work, so that its cache, `HF_HOME`, `HF_HUB_OFFLINE`, `HF_ENDPOINT` and tokens
    apply. The metadata are requested once first: without a network the library itself would retry for minutes.

    A download of weights that are not pinned is logged as such.

    Raises:
      UserError: the hub cannot be reached and the cache lacks the file, the hub refuses, the download
        breaks off, or the file's SHA-256 is not that of the pin.
    """
    if not released.sha256 and (pin := find_pin(released.hub_id)):
        released = dataclasses.replace(released, **pin._asdict())
    fetched = fetch_file(
        released.hub_id,
        _FILE,
        released.revision or None,
        what=f"the weights of {released.name}",
        instead=f"give {setting('weights', Literal('PATH'))} with a file of {released.name}",
    )
    file = fetched.path
    if not released.sha256 and fetched.is_new:
        _log.warning(
            "%s of %s is not pinned: it is the newest that the hub has, compared with no checksum (%s=FILE "
            "names the pins that `cait models --pin FILE` writes)", _FILE, released.hub_id, VARIABLE,
        )  # fmt: skip
    if released.sha256:
        found = sha256(file)
        if found != released.sha256:
            raise UserError(
                f"{file} has SHA-256 {found} instead of {released.sha256}: remove "
                f"{os.path.realpath(file)} and download it again"
            )
    return file


def pins_of(names: Iterable[str]) -> dict[str, Pin]:
    """The pins, by repository, of the released weights of these models; see `ask_for_pins`."""
    return ask_for_pins([RELEASED[name].hub_id for name in names], _FILE)
