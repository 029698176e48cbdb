"""Attention maps over the image, from the intermediates of one forward pass.

A map has one of four `KINDS`: scores before and weights after the softmax, each before and after talking heads.
`mixed_weights` multiply the values; their rows need not sum to 1, and they can be negative. Without talking heads
mixed and unmixed maps are the same.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.errors import UserError
from cait_jax.models.cait import CaiT

# Kind to the names it is recorded under: where heads are not mixed there is only the second.
KINDS = {
    "scores": ("logits",),
    "mixed_scores": ("mixed_logits", "logits"),
    "weights": ("softmax",),
    "mixed_weights": ("mixed_softmax", "softmax"),
}

Intermediates = Mapping[str, Any]
ImageMaps = Float[Array, "batch heads rows columns"]


def check_transformer(model: Any, name: str = "this network") -> CaiT:
    """The model, which the sentence calls by a name, if it has attention.

    Raises:
      UserError: it has none, as RegNetY.
    """
    if not isinstance(model, CaiT):
        raise UserError(
            f"{name} is a {type(model).__name__}, a convolutional network without attention to show: choose a "
            "CaiT, DeiT or ViT"
        )
    transformer: CaiT = model
    return transformer


def check_class_token(
    model: Any, name: str = "this network", way: str = "use rollout, relevance or a gradient"
) -> CaiT:
    """The model, if it has attention and a class token; `way` is what to do without.

    Raises:
      UserError: one of them is missing.
    """
    transformer = check_transformer(model, name)
    if transformer.class_token == "mean":
        raise UserError(
            f"{name} has no class token (its head reads the mean patch), so there is no attention of one: {way}"
        )
    return transformer


def patch_grid(model: CaiT) -> tuple[int, int]:
    """Rows and columns of patches."""
    height, width = model.image_size
    return height // model.patch_size, width // model.patch_size


def special_tokens(model: CaiT) -> tuple[int, ...]:
    """For each self-attention block the number of tokens (class, distillation, registers) before the patches."""
    if model.class_token == "input":
        return (sum(model.prefix.values()),) * model.depth
    if isinstance(model.class_token, int):
        return tuple(int(block >= model.class_token) for block in range(model.depth))
    return (0,) * model.depth


def special_names(model: CaiT) -> list[str]:
    """What these tokens are: "class", "distillation", "register 0", ..."""
    registers = [f"register {i}" for i in range(model.prefix.get("reg_token", 0))]
    return [*["class", "distillation"][: 1 + model.distilled], *registers]


def self_attention(
    model: CaiT, inside: Intermediates, kind: str = "mixed_weights"
) -> list[Float[Array, "batch heads _ _"]]:
    """The self-attention of each block, special tokens first; `inside` is of `forward_intermediates`."""
    blocks = inside["blocks"]
    if isinstance(blocks, list):
        return [_find(block, kind) for block in blocks]
    return list(_find(blocks, kind))


def class_attention(
    model: CaiT, inside: Intermediates, kind: str = "mixed_weights"
) -> list[Float[Array, "batch heads 1 keys"]]:
    """The class attention of each class-attention block, the class token's own column first."""
    if not model.class_depth:
        return []
    return list(_find(inside["blocks_token_only"], kind))


def all_attention(
    model: CaiT, inside: Intermediates, kind: str = "mixed_weights"
) -> list[Float[Array, "batch heads _ _"]]:
    """Self-attention of each block, then class attention of each class-attention block."""
    return [*self_attention(model, inside, kind), *class_attention(model, inside, kind)]


def token_names(model: CaiT, layer: int) -> list[str]:
    """What the columns of a layer's maps are, layers counted as in `all_attention`: "class", "0,0", "0,1", ..."""
    rows, columns = patch_grid(model)
    special = special_tokens(model)[layer] if layer < model.depth else 1
    patches = [f"{row},{column}" for row in range(rows) for column in range(columns)]
    return special_names(model)[:special] + patches


def class_token_maps(
    model: CaiT, inside: Intermediates, kind: str = "mixed_weights"
) -> Float[Array, "layers batch heads rows columns"]:
    """What the class token reads from each patch: of every class-attention block of a CaiT, else of every
    self-attention block that has the token. Weights do not sum to 1, as those on other tokens are left out.

    Raises:
      UserError: the network has no class token.
    """
    rows, columns = patch_grid(check_class_token(model))
    read = class_rows(model, inside, kind)
    return jnp.stack([over_image(model, row[:, :, -rows * columns :]) for row in read])


def class_rows(
    model: CaiT, inside: Intermediates, kind: str = "mixed_weights"
) -> list[Float[Array, "batch heads keys"]]:
    """What the class token reads from every token, special ones first, in each class-attention block of a CaiT,
    else in each self-attention block that has it."""
    if maps := class_attention(model, inside, kind):
        return [each[:, :, 0] for each in maps]
    layers = zip(self_attention(model, inside, kind), special_tokens(model), strict=True)
    return [each[:, :, 0] for each, special in layers if special]


def read_by(
    model: CaiT, inside: Intermediates, patch: int, kind: str = "mixed_weights"
) -> Float[Array, "layers batch heads rows columns"]:
    """What a patch, counted row by row, reads from every patch in each self-attention block."""
    layers = zip(self_attention(model, inside, kind), special_tokens(model), strict=True)
    patch = _check_patch(model, patch)
    return jnp.stack([over_image(model, maps[:, :, n + patch, n:]) for maps, n in layers])


def readers_of(
    model: CaiT, inside: Intermediates, patch: int, kind: str = "mixed_weights"
) -> Float[Array, "layers batch heads rows columns"]:
    """What every patch reads from a patch, counted row by row, in each self-attention block."""
    layers = zip(self_attention(model, inside, kind), special_tokens(model), strict=True)
    patch = _check_patch(model, patch)
    return jnp.stack([over_image(model, maps[:, :, n:, n + patch]) for maps, n in layers])


def over_image(
    model: CaiT, values: Float[Array, "*lead patches"]
) -> Float[Array, "*lead rows columns"]:
    """Values of the patches, without special tokens, as a grid."""
    return values.reshape(*values.shape[:-1], *patch_grid(model))


def _check_patch(model: CaiT, patch: int) -> int:
    rows, columns = patch_grid(model)
    if not 0 <= patch < rows * columns:
        raise UserError(
            f"there is no patch {patch}: an image has {rows} x {columns}, 0 to {rows * columns - 1}, row by row"
        )
    return patch


def _find(block: Mapping[str, Array], kind: str) -> Array:
    if kind not in KINDS:
        raise UserError(f"there is no kind of attention map {kind!r}: {', '.join(KINDS)}")
    return next(block[name] for name in KINDS[kind] if name in block)
