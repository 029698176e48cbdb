"""Attribution: how much each patch counts for a class.

| method | source | for a class |
|---|---|---|
| `class_attention` | the class token's weights, mean over heads (CaiT, figure 6) | no |
| `rollout` | Abnar and Zuidema, arXiv 2005.00928 | no |
| `relevance` | gradient x attention: Chefer et al., arXiv 2103.15679 | yes |
| `input_gradient` | gradient x input | yes |
| `integrated_gradients` | Sundararajan et al., arXiv 1703.01365 | yes |

All are pure functions of (model, variables, images, classes) and can be jitted with the model fixed.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cait_jax.errors import UserError
from cait_jax.explain.attention import (
    KINDS,
    Intermediates,
    check_class_token,
    check_transformer,
    class_attention,
    class_token_maps,
    over_image,
    self_attention,
    special_tokens,
)
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import by_stage, forward_intermediates
from cait_jax.models.layers import Images

Variables = Mapping[str, Any]
Classes = Int[Array, "batch"]
PatchMaps = Float[Array, "batch rows columns"]
Matrices = Float[Array, "batch _ _"]  # (batch, queries, keys), of one block among others


def attribute(
    method: str, model: Any, variables: Variables, images: Images, classes: Classes
) -> PatchMaps:
    """One map for each image by a method of `METHODS`, for the class given for it.

    Raises:
      UserError: for an unknown method, and for a network that the method cannot read.
    """
    if method not in METHODS:
        raise UserError(f"there is no method {method!r}: {', '.join(METHODS)}")
    return METHODS[method](model, variables, images, classes)


def class_saliency(model: Any, variables: Variables, images: Images, classes: Classes) -> PatchMaps:
    """The class token's weights, mean over heads: of the first class-attention block, else of the last block."""
    model = check_class_token(model)
    _, inside = forward_intermediates(model, variables, images)
    layer = 0 if model.class_depth else -1
    return class_token_maps(model, inside)[layer].mean(axis=1)


def rollout(model: Any, variables: Variables, images: Images, classes: Classes) -> PatchMaps:
    """Attention rollout of the token that the head reads."""
    model = check_transformer(model)
    _, inside = forward_intermediates(model, variables, images)
    return attention_rollout(model, inside)


def relevance(model: Any, variables: Variables, images: Images, classes: Classes) -> PatchMaps:
    """Gradient x attention relevance of the class for the token that the head reads."""
    model = check_transformer(model)
    _, inside, gradients = forward_gradients(model, variables, images, classes)
    return gradient_relevance(model, inside, gradients)


def attention_rollout(model: CaiT, inside: Intermediates) -> PatchMaps:
    """Rollout from recorded maps: the product over blocks of `(A + I) / 2`.

    A is the mean over heads of what multiplies the values. With talking heads those weights can be negative and
    rows need not sum to 1: A is made of their absolute values, and each row divided by its sum.
    """

    def mixed_with_identity(maps: Float[Array, "batch heads queries keys"]) -> Matrices:
        mean = jnp.abs(maps).mean(axis=1)
        return mean / mean.sum(axis=-1, keepdims=True) / 2

    return _read_back(
        model,
        _each(mixed_with_identity, self_attention(model, inside)),
        [mixed_with_identity(maps) for maps in class_attention(model, inside)],
        residual=0.5,
    )


def gradient_relevance(model: CaiT, inside: Intermediates, gradients: Intermediates) -> PatchMaps:
    """Relevance from recorded maps A and the gradients of a class logit: R <- R + mean_h(relu(dA * A)) R.

    In self-attention this is the paper's equations 5 and 6. In class attention only the class token's row
    changes: R_cls <- R_cls + A_cls R_cls + A_patches R_patches, with R_patches left by self-attention.
    """

    def positive(maps: Array, gradient: Array) -> Matrices:
        return jax.nn.relu(maps * gradient).mean(axis=1)

    blocks = _each(positive, self_attention(model, inside), self_attention(model, gradients))
    of_class = zip(class_attention(model, inside), class_attention(model, gradients), strict=True)
    return _read_back(model, blocks, [positive(*pair) for pair in of_class])


def forward_gradients(
    model: CaiT, variables: Variables, images: Images, classes: Classes
) -> tuple[Float[Array, "batch outputs"], Intermediates, Intermediates]:
    """Logits, intermediates, and the gradients of each image's class logit with respect to its attention weights.

    The gradients have the structure of the intermediates, with the weights that multiply the values alone.
    """
    shapes = jax.eval_shape(
        lambda: model.apply(variables, images, mutable=["intermediates"])[1]["intermediates"]
    )
    zeros = jax.tree.map(jnp.zeros_like, _weights(shapes))

    def score(perturbations: Any) -> tuple[Array, Any]:
        given = {**variables, "perturbations": perturbations}
        logits, inside = forward_intermediates(model, given, images)
        return _of_classes(logits, classes).sum(), (logits, inside)

    gradients, (logits, inside) = jax.grad(score, has_aux=True)(zeros)
    return logits, inside, by_stage(model, gradients)


def input_gradient(model: Any, variables: Variables, images: Images, classes: Classes) -> PatchMaps:
    """Gradient x input of the class logit, summed over the pixels of each patch."""
    images = jnp.asarray(images)
    return _by_patch(model, _pixel_gradient(model, variables, images, classes) * images)


def integrated_gradients(
    model: Any,
    variables: Variables,
    images: Images,
    classes: Classes,
    *,
    steps: int = 32,
) -> PatchMaps:
    """The gradient's mean on the line from the mean colour (0, normalised) to the image, times the image.

    By the midpoint rule. Summed over the patches it is the class logit less that of the mean colour, but for the
    error of `steps`.
    """
    images = jnp.asarray(images)
    fractions = (jnp.arange(steps) + 0.5) / steps

    def add(total: Array, fraction: Array) -> tuple[Array, None]:
        return total + _pixel_gradient(model, variables, fraction * images, classes), None

    total, _ = jax.lax.scan(add, jnp.zeros_like(images), fractions)
    return _by_patch(model, total / steps * images)


METHODS: Mapping[str, Callable[..., PatchMaps]] = {
    "class_attention": class_saliency,
    "rollout": rollout,
    "relevance": relevance,
    "input_gradient": input_gradient,
    "integrated_gradients": integrated_gradients,
}
FOR_A_CLASS = frozenset({"relevance", "input_gradient", "integrated_gradients"})  # need a head


def _each(
    function: Callable[..., Matrices], *layers: Sequence[Float[Array, "batch heads _ _"]]
) -> list[Float[Array, "_ batch _ _"]]:
    """The function of each block's maps, stacked over consecutive blocks of as many tokens, to compile once."""
    runs = itertools.groupby(zip(*layers, strict=True), key=lambda maps: maps[0].shape)
    return [
        jax.lax.map(
            lambda maps: function(*maps),
            tuple(jnp.stack(kind) for kind in zip(*run, strict=True)),
        )
        for _, run in runs
    ]


def _read_back(
    model: CaiT,
    blocks: Sequence[Float[Array, "_ batch _ _"]],
    class_blocks: Sequence[Float[Array, "batch 1 _"]],
    residual: float = 1.0,
) -> PatchMaps:
    """What the output holds of each patch, if a block maps the tokens' shares R to `residual * R + A @ R`.

    The product over blocks is applied to the row of the token that the head reads, from the last block to the
    first; where it reads the mean of several tokens, to the mean of their rows.
    """
    specials, (_, batch, tokens, _) = special_tokens(model), blocks[-1].shape
    if class_blocks:
        cls, row = jnp.ones((batch,)), jnp.zeros((batch, tokens))
        for A in reversed(class_blocks):
            row = row + cls[:, None] * A[:, 0, 1:]
            cls = (residual + A[:, 0, 0]) * cls
    else:
        _, read = model.read(jnp.eye(tokens)[None])
        row = read.mean(axis=1).repeat(batch, axis=0)

    def through(row: Array, A: Array) -> tuple[Array, None]:
        return residual * row + jnp.einsum("bq,bqk->bk", row, A), None

    for run in reversed(blocks):
        # A token that has not joined yet holds nothing.
        row = row[:, row.shape[1] - run.shape[-1] :]
        row, _ = jax.lax.scan(through, row, run, reverse=True)
    return over_image(model, row[:, specials[0] :])


def _weights(intermediates: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that multiply the values, of each block that has attention."""
    blocks = {name: block["attn"] for name, block in intermediates.items()
              if isinstance(block, Mapping) and "attn" in block}  # fmt: skip
    return {
        name: {"attn": {kind: attn[kind]}}
        for name, attn in blocks.items()
        for kind in [next(kind for kind in KINDS["mixed_weights"] if kind in attn)]
    }


def _of_classes(logits: Float[Array, "batch outputs"], classes: Classes) -> Float[Array, "batch"]:
    return jnp.take_along_axis(logits, classes[:, None], axis=1)[:, 0]


def _pixel_gradient(
    model: Any, variables: Variables, images: Images, classes: Classes
) -> Float[Array, "batch height width channels"]:
    def score(images: Any) -> Array:
        return _of_classes(model.apply(variables, images), classes).sum()

    gradient: Array = jax.grad(score)(images)
    return gradient


def _by_patch(model: Any, values: Float[Array, "batch height width channels"]) -> PatchMaps:
    model, side = check_transformer(model), model.patch_size
    batch, height, width, channels = values.shape
    return values.reshape(batch, height // side, side, width // side, side, channels).sum((2, 4, 5))
