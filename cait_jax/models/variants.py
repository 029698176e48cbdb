"""The table of named models: for each name a network and its attributes."""

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named architecture: its network's class by name, and attributes; `image_size` as one side in pixels."""

    family: str
    attributes: Mapping[str, Any]


_SIZES = ("width", "depth", "num_heads")

# Paper, table 1 and appendix; drop path and LayerScale start values as in the released code.
_CAIT = {
    "cait_xxs24": (192, 24, 4, 0.05, 1e-5),
    "cait_xxs36": (192, 36, 4, 0.1, 1e-5),
    "cait_xs24": (288, 24, 6, 0.05, 1e-5),
    "cait_xs36": (288, 36, 6, 0.1, 1e-6),
    "cait_s24": (384, 24, 8, 0.1, 1e-5),
    "cait_s36": (384, 36, 8, 0.2, 1e-6),
    "cait_s48": (384, 48, 8, 0.3, 1e-6),
    "cait_m24": (768, 24, 16, 0.2, 1e-5),
    "cait_m36": (768, 36, 16, 0.3, 1e-6),
    "cait_m48": (768, 48, 16, 0.4, 1e-6),
    # Not of the paper, but by its rule for LayerScale: 0.1 up to depth 18.
    "cait_xxs12_patch4_32": (192, 12, 4, 0.05, 0.1),
    "cait_nano4_patch4_8": (64, 4, 4, 0.0, 0.1),
}
_OTHERS: Mapping[str, Mapping[str, Any]] = {
    "cait_xxs12_patch4_32": {"patch_size": 4, "image_size": 32},
    "cait_nano4_patch4_8": {"patch_size": 4, "image_size": 8, "in_channels": 1},
}
# The resolutions of the ten sets of weights that the authors released.
_RELEASED = {
    "cait_xxs24": (224, 384),
    "cait_xxs36": (224, 384),
    "cait_xs24": (384,),
    "cait_s24": (224, 384),
    "cait_s36": (384,),
    "cait_m36": (384,),
    "cait_m48": (448,),
}
# Sizes as in DeiT and AugReg (arXiv 2106.10270), but for the last two, which are ours.
_VIT = {
    "vit_tiny": (192, 12, 3),
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
    "vit_6x256": (256, 6, 4),
    "vit_8x384": (384, 8, 6),
}
# DeiT III (arXiv 2204.07118), table 2.
_DEIT3 = {
    "deit3_small": (384, 12, 6),
    "deit3_medium": (512, 12, 8),
    "deit3_base": (768, 12, 12),
    "deit3_large": (1024, 24, 16),
}
# DINOv2 (arXiv 2304.07193), table 17; the largest has gated MLPs.
_DINOV2 = {
    "vit_small": (384, 12, 6),
    "vit_base": (768, 12, 12),
    "vit_large": (1024, 24, 16),
    "vit_giant": (1536, 40, 24),
}
# DeiT's paper, table 1; stochastic depth as in its recipe, table 9.
_DEIT = {"deit_tiny": (192, 12, 3), "deit_small": (384, 12, 6), "deit_base": (768, 12, 12)}
# RegNetY-16GF, the teacher of DeiT and CaiT.
_REGNETY_160 = {"w0": 200, "wa": 106.23, "wm": 2.48, "depth": 18, "group_width": 112}

_attributes: dict[str, dict[str, Any]] = {
    name: {
        "image_size": 224,
        **dict(zip((*_SIZES, "drop_path_rate", "layer_scale_init"), values, strict=True)),
        **_OTHERS.get(name, {}),
    }
    for name, values in _CAIT.items()
}
_attributes |= {
    f"{name}_{size}": {**_attributes[name], "image_size": size}
    for name, sizes in _RELEASED.items()
    for size in sizes
}
_attributes |= {
    name: {"image_size": 224, **dict(zip(_SIZES, values, strict=True))}
    for name, values in (_VIT | _DEIT).items()
}
for _name in _DEIT:
    _attributes[_name]["drop_path_rate"] = 0.1
    _attributes[f"{_name}_distilled"] = {**_attributes[_name], "distilled": True}
_attributes |= {
    name: {
        "image_size": 224,
        **dict(zip(_SIZES, values, strict=True)),
        "residual": "layerscale",
        "layer_scale_init": 1e-6,
        "class_position": False,
    }
    for name, values in _DEIT3.items()
}
# The names that weights are published under say patch size and resolution, and after a point what taught them. A
# name without that is of the classifier that timm gives for it; the others here are released without a head.
_attributes |= {
    f"{name}_patch16_{size}": {**_attributes[name], "image_size": size}
    for size, names in (
        (224, ("vit_tiny", "vit_small", "vit_base", "vit_large", *_DEIT, *_DEIT3)),
        (224, (f"{name}_distilled" for name in _DEIT)),
        (384, ("vit_base", "deit3_small", "deit3_base", "deit3_large")),
    )
    for name in names
}
_attributes |= {
    f"{name}.fb_in22k_ft_in1k": attributes
    for name, attributes in _attributes.items()
    if name.startswith("deit3") and "_patch16_" in name
}
_attributes |= {
    f"{name}_patch{patch}_224.{tag}": {**_attributes[name], "patch_size": patch, "num_classes": 0}
    for name, patch, tag in (
        *((name, patch, "dino") for name in ("vit_small", "vit_base") for patch in (16, 8)),
        *((name, 16, "mae") for name in ("vit_base", "vit_large")),
    )
}
_REGISTERS = {"registers": 4, "class_position": False}
_SWIGLU = {"swiglu": True, "mlp_ratio": 2.66667 * 2}  # 4,096 channels after the gate
_attributes |= {
    f"{name}_patch14{with_registers}_dinov2.lvd142m": {
        "image_size": 518,
        **dict(zip(_SIZES, values, strict=True)),
        "patch_size": 14,
        "num_classes": 0,
        "residual": "layerscale",
        "layer_scale_init": 1e-5,
        **(_REGISTERS if with_registers else {}),
        **(_SWIGLU if name == "vit_giant" else {}),
    }
    for name, values in _DINOV2.items()
    for with_registers in ("", "_reg4")
}

VARIANTS: Mapping[str, Variant] = {
    name: Variant("CaiT" if name.startswith("cait") else "VisionTransformer", attributes)
    for name, attributes in _attributes.items()
} | {"regnety_160": Variant("RegNetY", {"image_size": 224, **_REGNETY_160})}
