"""The table of named models, and the calls that make one from its name."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from cait_jax.errors import KEY_OF, UserError, can_set, nearest, setting
from cait_jax.models.cait import CaiT
from cait_jax.models.regnet import RegNetY

Network = CaiT | RegNetY

FLOAT_DTYPES = ("bfloat16", "float32", "float64")


class VisionTransformer(CaiT):
    """`CaiT` with the choices of ViT (Dosovitskiy et al., arXiv 2010.11929) as defaults.

    With `distilled=True` it is the distilled network of DeiT (Touvron et al., arXiv 2012.12877).
    """

    residual: str = "plain"
    talking_heads: bool = False
    class_token: str | int = "input"
    drop_path_growth: str = "linear"


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named architecture: a network and its attributes, `image_size` as the side it was made for."""

    network: Any
    attributes: Mapping[str, Any]

    def at(self, image_size: int) -> "Variant":
        """The same for another resolution."""
        return Variant(self.network, {**self.attributes, "image_size": image_size})


def _cait(
    width: int,
    depth: int,
    num_heads: int,
    drop_path_rate: float,
    layer_scale_init: float,
    **others: Any,
) -> Variant:
    attributes = {
        "width": width,
        "depth": depth,
        "num_heads": num_heads,
        "drop_path_rate": drop_path_rate,
        "layer_scale_init": layer_scale_init,
    }
    return Variant(CaiT, {"image_size": 224, **attributes, **others})


def _vit(width: int, depth: int, num_heads: int, **others: Any) -> Variant:
    attributes = {"width": width, "depth": depth, "num_heads": num_heads}
    return Variant(VisionTransformer, {"image_size": 224, **attributes, **others})


# Paper, table 1 and appendix; drop path and LayerScale start values as in the released code.
_PAPER = {
    "cait_xxs24": _cait(192, 24, 4, 0.05, 1e-5),
    "cait_xxs36": _cait(192, 36, 4, 0.1, 1e-5),
    "cait_xs24": _cait(288, 24, 6, 0.05, 1e-5),
    "cait_xs36": _cait(288, 36, 6, 0.1, 1e-6),
    "cait_s24": _cait(384, 24, 8, 0.1, 1e-5),
    "cait_s36": _cait(384, 36, 8, 0.2, 1e-6),
    "cait_s48": _cait(384, 48, 8, 0.3, 1e-6),
    "cait_m24": _cait(768, 24, 16, 0.2, 1e-5),
    "cait_m36": _cait(768, 36, 16, 0.3, 1e-6),
    "cait_m48": _cait(768, 48, 16, 0.4, 1e-6),
}

# The ten sets of weights the authors released, each at one resolution.
_RELEASED = (
    ("cait_xxs24", 224),
    ("cait_xxs24", 384),
    ("cait_xxs36", 224),
    ("cait_xxs36", 384),
    ("cait_xs24", 384),
    ("cait_s24", 224),
    ("cait_s24", 384),
    ("cait_s36", 384),
    ("cait_m36", 384),
    ("cait_m48", 448),
)

# Not of the paper, but by its rule for LayerScale: 0.1 up to depth 18.
_SMALL = {
    "cait_xxs12_patch4_32": _cait(192, 12, 4, 0.05, 0.1, patch_size=4, image_size=32),
    "cait_nano4_patch4_8": _cait(64, 4, 4, 0.0, 0.1, patch_size=4, image_size=8, in_channels=1),
}

_VIT = {
    "vit_tiny": _vit(192, 12, 3),
    "vit_small": _vit(384, 12, 6),
    "vit_base": _vit(768, 12, 12),
    "vit_large": _vit(1024, 24, 16),
    "vit_huge": _vit(1280, 32, 16),
    "vit_6x256": _vit(256, 6, 4),
    "vit_8x384": _vit(384, 8, 6),
}

# DeiT's paper, table 1; stochastic depth as in its recipe, table 9.
_DEIT_SIZES = {"tiny": (192, 12, 3), "small": (384, 12, 6), "base": (768, 12, 12)}
_DEIT = {f"deit_{size}": _vit(*of, drop_path_rate=0.1) for size, of in _DEIT_SIZES.items()} | {
    f"deit_{size}_distilled": _vit(*of, drop_path_rate=0.1, distilled=True)
    for size, of in _DEIT_SIZES.items()
}

# RegNetY-16GF, the teacher of DeiT and CaiT.
_REGNET = {
    "regnety_160": Variant(
        RegNetY,
        {"image_size": 224, "w0": 200, "wa": 106.23, "wm": 2.48, "depth": 18, "group_width": 112},
    )
}

# The names that weights are published under say patch size and resolution.
_ALIASES = {
    **{f"{name}_patch16_224": _VIT[name] for name in ("vit_base", "vit_large")},
    **{f"{name}_patch16_224": variant for name, variant in _DEIT.items()},
}

VARIANTS: Mapping[str, Variant] = (
    _PAPER
    | {f"{name}_{size}": _PAPER[name].at(size) for name, size in _RELEASED}
    | _SMALL
    | _VIT
    | _DEIT
    | _ALIASES
    | _REGNET
)


def list_models(pattern: str = "*") -> list[str]:
    """Names the models whose name matches a shell pattern, such as `"cait_s*"`, in alphabetical order."""
    return sorted(fnmatch.filter(VARIANTS, pattern))


def create_model(
    name: str,
    *,
    image_size: int | tuple[int, int] | None = None,
    num_classes: int = 1000,
    in_channels: int | None = None,
    drop_path_rate: float | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    precision: Any = None,
    **overrides: Any,
) -> Network:
    """Makes a model by name: an architecture, without parameters.

    Args:
      name: a name of `list_models()`.
      image_size: side in pixels, or (height, width); the name's own resolution if not given.
      num_classes: classes of the head; 0 gives features.
      in_channels: channels of the images; the name's own if not given.
      drop_path_rate: stochastic-depth rate in training; the published one for this model if not given.
      dtype: dtype of the computation, such as `jnp.bfloat16` or `"bfloat16"`.
      param_dtype: dtype of the parameters.
      precision: precision of matrix products, such as `"highest"`.
      **overrides: any other attribute of the network, such as `depth=12`; None means the name's own.

    Returns:
      A Flax Linen module: `variables = model.init(key, images)`, `logits = model.apply(variables, images)`.

    Raises:
      UserError: for an unknown name or attribute, and for sizes or head counts that do not fit.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, VARIANTS)}")
    variant = VARIANTS[name]
    fields = {field.name for field in dataclasses.fields(variant.network)} - {"parent", "name"}
    for key in overrides:
        if key not in fields:
            raise UserError(f"{name} has no attribute {key!r}; {nearest(key, fields)}")
    overrides |= {"in_channels": in_channels, "drop_path_rate": drop_path_rate}
    overrides = {key: value for key, value in overrides.items() if value is not None}

    size = variant.attributes["image_size"] if image_size is None else image_size
    attributes = {
        **variant.attributes,
        **overrides,
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
    }
    try:
        return variant.network(
            num_classes=num_classes,
            dtype=float_dtype("dtype", dtype),
            param_dtype=float_dtype("param_dtype", param_dtype),
            precision=precision,
            **attributes,
        )
    except (TypeError, ValueError) as error:
        raise misfit(name, error) from error


def misfit(name: str, error: Exception) -> UserError:
    """The error of a network whose attributes do not fit, in the words of the interface.

    Args:
      name: of the model or the network.
      error: its message begins with the attribute, as those of `complete_options` do.
    """
    attribute, space, rest = str(error).partition(" ")
    named = setting(attribute) if attribute in KEY_OF and can_set(attribute) else attribute
    return UserError(f"{name}: {named}{space}{rest}")


def float_dtype(argument: str, dtype: Any) -> Any:
    """A floating-point dtype of networks, from itself or from its name.

    Args:
      argument: what it is given for, to name it in the error.
      dtype: such as `jnp.bfloat16` or `"bfloat16"`.

    Raises:
      UserError: it is none of bfloat16, float32 and float64.
    """
    known = {name: jnp.dtype(name) for name in FLOAT_DTYPES}
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in known:
        raise UserError(f"there is no {argument} {name!r}; {nearest(name, known)}")
    return known[name]
