"""Other names of config keys: arguments of the Python API; old names of keys, values and config files."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_MODEL = (
    "width", "depth", "num_heads", "patch_size", "mlp_ratio", "residual", "block_norm", "layer_scale_init",
    "talking_heads", "class_token", "class_depth", "class_mlp_ratio", "distilled", "class_position", "registers",
    "mean_pool", "swiglu", "drop_path_rate", "drop_path_growth", "embedding_dropout", "attention_dropout",
    "projection_dropout", "dropout", "dtype", "param_dtype", "precision", "remat", "attention", "stacked",
)  # fmt: skip
# Arguments of the Python API that a config has as well, and the key there.
KEY_OF: Mapping[str, str] = {
    **{name: f"config.{name}" for name in ("image_size", "seed", "epochs", "batch_size")},
    **{name: f"config.init.{name}" for name in ("weights", "reset_head", "ema")},
    **{name: f"config.data.{name}" for name in ("data_dir", "workers")},
    **{name: f"config.lora.{name}" for name in ("rank", "alpha")},
    "name_or_path": "config.model.name",
    **{name: f"config.model.{name}" for name in _OF_MODEL},
}

# Old key to new, since the names of timm and big_vision are used where they have one.
OLD_KEYS: Mapping[str, str] = {
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

# What a key that is missing in an old run's config meant, where that is not the default of today.
MEANT_BEFORE: Mapping[str, Any] = {
    "data.aug_repeats": 1,
    "augment.rand_augment": "",
    "augment.reprob": 0.0,
    "augment.mixup": 0.0,
    "augment.cutmix": 0.0,
}

# Names of models that have other shapes now, in runs whose configs have an old key.
OLD_MODELS: Mapping[str, str] = {"vit_tiny": "vit_6x256", "vit_small": "vit_8x384"}

# Key and old value to new.
OLD_VALUES: Mapping[tuple[str, str], str] = {("model.attention", "xla_lean"): "xla_remat"}

# Stem of an old config file to the new file and its argument.
_OLD_FILES = (
    (r"(cait_\w+)_(384|448|distilled)", r"\1.py:\2"),
    (r"(cifar10)_(small)", r"\1.py:\2"),
    (r"(deit)_(tiny|small|base)", r"\1.py:\2"),
    (r"(deit)_(tiny|small|base)_(384|distilled)", r"\1.py:\2,\3"),
    (r"(transfer)_(\w+)", r"\1.py:\2"),
)


def current_file(path: Path) -> str | None:
    """Where the recipe of an old config file is now, such as `configs/cait_xs24.py:384`; None if it is not one."""
    for old, new in _OLD_FILES:
        if found := re.fullmatch(old, path.stem):
            now = found.expand(new)
            if path.with_name(now.partition(":")[0]).is_file():
                return str(path.with_name(now))
    return None


def renamed_in(message: str) -> str:
    """What a `ConfigDict`'s message about a missing key leaves out: the key's new name, if it has one."""
    missing = re.match(r"""["']*(?:Key )?["']?(\w+)""", message)
    new = [now for old, now in OLD_KEYS.items() if missing and old.endswith(f".{missing[1]}")]
    return f"; the key is {new[0]} now" if new else ""


def current_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved run's config, a mapping for each section, under the keys of today."""
    current = {
        name: _current_section(name, section) if isinstance(section, Mapping) else section
        for name, section in config.items()
    }
    if current != config:
        model = current["model"]
        model["name"] = OLD_MODELS.get(model["name"], model["name"])
    return current


def current_attributes(attributes: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model's attributes under the names of today."""
    return _current_section("model", attributes)


def current_preprocessing(settings: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model's preprocessing under the names of today."""
    return {_last(f"eval.{name}"): value for name, value in settings.items()}


def _current_section(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        _last(f"{section}.{key}"): OLD_VALUES.get((f"{section}.{key}", str(value)), value)
        for key, value in values.items()
    }


def _last(key: str) -> str:
    return OLD_KEYS.get(key, key).rpartition(".")[2]
