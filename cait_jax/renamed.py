"""Names that changed: old config keys, which command lines and saved runs may still have."""

from collections.abc import Mapping
from typing import Any

# Old key to new, since the names of timm and big_vision are used where they have one.
KEYS: Mapping[str, str] = {
    "model.drop_path": "model.drop_path_rate",
    "data.repeats": "data.aug_repeats",
    "augment.crop_area": "augment.scale",
    "augment.crop_aspect": "augment.ratio",
    "augment.flip": "augment.hflip",
    "augment.erase": "augment.reprob",
    "augment.mix_probability": "augment.mixup_prob",
    "augment.mix_switch": "augment.mixup_switch_prob",
    "loss.label_smoothing": "loss.smoothing",
    "loss.threshold": "loss.target_threshold",
    "distill.weight": "distill.alpha",
    "optimizer.accumulate": "optimizer.grad_accum",
    "optimizer.sharpness_radius": "optimizer.sam_rho",
    "optimizer.clip_norm": "optimizer.grad_clip_norm",
    "eval.crop_ratio": "eval.crop_pct",
}


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved run's config under the keys of today.

    Args:
      config: as a checkpoint's metadata have it, with a mapping for each section.
    """
    return {
        name: {_last(f"{name}.{key}"): value for key, value in section.items()}
        if isinstance(section, Mapping)
        else section
        for name, section in config.items()
    }


def current_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model's attributes under the names of today."""
    return {_last(f"model.{name}"): value for name, value in attributes.items()}


def _last(key: str) -> str:
    return KEYS.get(key, key).rpartition(".")[2]
