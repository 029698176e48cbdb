"""The table of named models, and the calls that make one from its name."""

import dataclasses
import fnmatch
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.errors import UserError, nearest
from cait_jax.models.cait import CaiT
from cait_jax.models.layers import Images


@dataclasses.dataclass(frozen=True)
class Variant:
    """A named architecture. The fields are those of `CaiT`; `image_size` is the side it was made for."""

    width: int
    depth: int
    num_heads: int
    drop_path: float
    layer_scale_init: float
    patch_size: int = 16
    image_size: int = 224
    in_channels: int = 3


# Paper, table 1 and appendix; drop path and LayerScale start values as in the released code.
_PAPER = {
    "cait_xxs24": Variant(192, 24, 4, 0.05, 1e-5),
    "cait_xxs36": Variant(192, 36, 4, 0.1, 1e-5),
    "cait_xs24": Variant(288, 24, 6, 0.05, 1e-5),
    "cait_xs36": Variant(288, 36, 6, 0.1, 1e-6),
    "cait_s24": Variant(384, 24, 8, 0.1, 1e-5),
    "cait_s36": Variant(384, 36, 8, 0.2, 1e-6),
    "cait_s48": Variant(384, 48, 8, 0.3, 1e-6),
    "cait_m24": Variant(768, 24, 16, 0.2, 1e-5),
    "cait_m36": Variant(768, 36, 16, 0.3, 1e-6),
    "cait_m48": Variant(768, 48, 16, 0.4, 1e-6),
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
    "cait_xxs12_patch4_32": Variant(192, 12, 4, 0.05, 0.1, patch_size=4, image_size=32),
    "cait_nano4_patch4_8": Variant(64, 4, 4, 0.0, 0.1, patch_size=4, image_size=8, in_channels=1),
}

VARIANTS: Mapping[str, Variant] = (
    _PAPER
    | {f"{n}_{size}": dataclasses.replace(_PAPER[n], image_size=size) for n, size in _RELEASED}
    | _SMALL
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
    drop_path: float | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    precision: Any = None,
    **overrides: Any,
) -> CaiT:
    """Makes a model by name: an architecture, without parameters.

    Args:
      name: a name of `list_models()`.
      image_size: side in pixels, or (height, width); the name's own resolution if not given.
      num_classes: classes of the head; 0 gives features.
      in_channels: channels of the images; the name's own if not given.
      drop_path: stochastic-depth rate in training; the paper's for this model if not given.
      dtype: dtype of the computation, such as `jnp.bfloat16` or `"bfloat16"`.
      param_dtype: dtype of the parameters.
      precision: precision of matrix products, such as `"highest"`.
      **overrides: any other attribute of `CaiT`, such as `depth=12`.

    Returns:
      A Flax Linen module: `variables = model.init(key, images)`, `logits = model.apply(variables, images)`.

    Raises:
      UserError: for an unknown name or attribute, and for sizes or head counts that do not fit.
    """
    if name not in VARIANTS:
        raise UserError(f"there is no model {name!r}; {nearest(name, VARIANTS)}")
    fields = {field.name for field in dataclasses.fields(CaiT)} - {"parent", "name"}
    for key in overrides:
        if key not in fields:
            raise UserError(f"{name} has no attribute {key!r}; {nearest(key, fields)}")

    attributes = dataclasses.asdict(VARIANTS[name])
    given = {"image_size": image_size, "in_channels": in_channels, "drop_path": drop_path}
    attributes |= {key: value for key, value in given.items() if value is not None}
    attributes |= overrides
    size = attributes.pop("image_size")
    try:
        return CaiT(
            image_size=(size, size) if isinstance(size, int) else tuple(size),
            num_classes=num_classes,
            dtype=_float_dtype("dtype", dtype),
            param_dtype=_float_dtype("param_dtype", param_dtype),
            precision=precision,
            **attributes,
        )
    except (TypeError, ValueError) as error:
        raise UserError(f"{name}: {error}") from error


def _float_dtype(argument: str, dtype: Any) -> Any:
    known = {name: jnp.dtype(name) for name in ("bfloat16", "float32", "float64")}
    name = dtype if isinstance(dtype, str) else jnp.dtype(dtype).name
    if name not in known:
        raise UserError(f"there is no {argument} {name!r}; {nearest(name, known)}")
    return known[name]


def forward_intermediates(
    model: CaiT, variables: Mapping[str, Any], images: Images
) -> tuple[Float[Array, "batch outputs"], dict[str, Any]]:
    """Runs the model once and gives, beside its output, what happened inside.

    Args:
      model: a model, stacked or not.
      variables: its variables.
      images: normalised float images, (batch, height, width, channels).

    Returns:
      The output of `model.apply(variables, images)`, and a dict of
        `blocks`: `features` (depth, batch, patches, width) and, of talking-heads attention, `logits`,
          `mixed_logits`, `softmax`, `mixed_softmax` (depth, batch, heads, patches, patches);
        `blocks_token_only`: `features` (class_depth, batch, 1, width) and `softmax`
          (class_depth, batch, heads, 1, 1 + patches), the class token's own column first;
        `features`: (batch, width), the normed class token that the head reads.
    """
    output, mutated = model.apply(variables, images, mutable=["intermediates"])
    tree = mutated["intermediates"]
    if "blocks" not in tree:
        tree |= {"blocks": _stack([tree[f"blocks_{i}"] for i in range(model.depth)])}
    token_only = _stack([tree[f"blocks_token_only_{i}"] for i in range(model.class_depth)])
    return output, {
        "blocks": _flatten(tree["blocks"]),
        "blocks_token_only": _flatten(token_only),
        "features": tree["features"],
    }


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _flatten(block: Mapping[str, Any]) -> dict[str, Array]:
    return {"features": block["features"], **block["attn"]}
