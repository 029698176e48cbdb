"""The released weights: where each lies, how its images are prepared, what it scores."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from cait_jax.errors import UserError, nearest
from cait_jax.interface import Literal, setting
from cait_jax.models.zoo import VARIANTS

_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
# results/results-imagenet.csv of huggingface/pytorch-image-models, at the same size and crop.
_TIMM = "timm's measurement"
_DEIT = "DeiT paper, arXiv 2012.12877"


@dataclasses.dataclass(frozen=True)
class Released:
    """One set of released weights.

    Attributes:
      name: of the model, as `create_model` takes it.
      hub_id: repository on the Hugging Face hub; the weights are its `model.safetensors`.
      image_size: side in pixels of the images it was evaluated on.
      crop_ratio: side of the centre crop over the short side of the resized image.
      mean: of each channel, on a scale from 0 to 1.
      std: of each channel, likewise.
      top1: accuracy on ImageNet-1k's validation images in percent, with this size and crop; None where no
        figure is certain.
      source: where `top1` is from.
      revision: commit of the repository; empty: the newest.
      sha256: of the file, in hexadecimal; empty: not checked.
    """

    name: str
    hub_id: str
    image_size: int
    crop_ratio: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    top1: float | None
    source: str
    revision: str = ""
    sha256: str = ""

    def preprocessing(self) -> dict[str, Any]:
        """What images need before the model sees them, in what JSON can hold."""
        return {
            "image_size": [self.image_size, self.image_size],
            "crop_ratio": self.crop_ratio,
            "mean": list(self.mean),
            "std": list(self.std),
            "channels": 3,
        }


def _cait() -> Iterator[Released]:
    for name, size, top1 in (
        ("cait_xxs24", 224, 78.400),
        ("cait_xxs24", 384, 80.954),
        ("cait_xxs36", 224, 79.750),
        ("cait_xxs36", 384, 82.204),
        ("cait_xs24", 384, 84.064),
        ("cait_s24", 224, 83.484),
        ("cait_s24", 384, 85.048),
        ("cait_s36", 384, 85.458),
        ("cait_m36", 384, 86.060),
        ("cait_m48", 448, 86.480),
    ):
        full = f"{name}_{size}"
        yield Released(full, f"timm/{full}.fb_dist_in1k", size, 1.0, *_IMAGENET, top1, _TIMM)


def _deit() -> Iterator[Released]:
    for name, top1 in (
        ("deit_tiny_patch16_224", 72.172),
        ("deit_small_patch16_224", 79.844),
        ("deit_base_patch16_224", 81.992),
        ("deit_tiny_distilled_patch16_224", 74.500),
        ("deit_small_distilled_patch16_224", 81.218),
        ("deit_base_distilled_patch16_224", 83.386),
    ):
        yield Released(name, f"timm/{name}.fb_in1k", 224, 0.9, *_IMAGENET, top1, _TIMM)


def _vit() -> Iterator[Released]:
    for name, top1 in (("vit_base_patch16_224", 84.532), ("vit_large_patch16_224", 85.834)):
        weights = f"timm/{name}.augreg_in21k_ft_in1k"
        yield Released(name, weights, 224, 0.9, *_HALF, top1, _TIMM)


# The teacher of DeiT and CaiT, at the resolution it teaches and was trained at, with the crop of DeiT's
# code. (timm measures it at 288 pixels, where it has 83.690 with a crop of 1.0.)
_REGNETY = Released(
    "regnety_160", "timm/regnety_160.deit_in1k", 224, 0.875, *_IMAGENET, 82.9, _DEIT
)

RELEASED: Mapping[str, Released] = {
    row.name: row for row in (*_cait(), *_deit(), *_vit(), _REGNETY)
}


def find_released(name: str) -> Released:
    """The released weights of a named model.

    Args:
      name: a name such as `"cait_xs24_384"`.

    Raises:
      UserError: the name is unknown, or no weights were released under it; with the names under which the
        same architecture was.
    """
    if name in RELEASED:
        return RELEASED[name]
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, {*VARIANTS, *RELEASED})}")
    network = VARIANTS[name].at(0)
    same = [other for other in RELEASED if other in VARIANTS and VARIANTS[other].at(0) == network]
    if same:
        raise UserError(
            f"no weights were released as {name}; the same architecture was as {' and '.join(same)}, "
            f"which can be loaded with another {setting('image_size')}"
        )
    raise UserError(
        f"no weights were released for {name}: give {setting('weights', Literal('PATH'))}, or choose one of "
        f"{', '.join(sorted(RELEASED))}"
    )
