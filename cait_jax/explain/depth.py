"""Statistics by layer: of attention, of features, of residual branches.

The first four take `weights`, rows that sum to 1 (attention after the softmax, before talking heads).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.explain.attention import check_transformer, patch_grid
from cait_jax.models.cait import CaiT, ClassAttentionBlock, SelfAttentionBlock
from cait_jax.models.layers import Images

Weights = Float[Array, "batch heads queries keys"]
ByHead = Float[Array, "heads"]


def attention_entropy(weights: Weights) -> ByHead:
    """Entropy of the rows in nats, mean over images and queries; at most log(keys)."""
    terms = jnp.where(weights > 0, weights * jnp.log(jnp.where(weights > 0, weights, 1.0)), 0.0)
    return -terms.sum(axis=-1).mean(axis=(0, 2))


def attention_distance(model: CaiT, weights: Weights) -> ByHead:
    """Distance in pixels from a patch's centre to those it reads, weighted, mean over images and patches.

    Special tokens, in front, are left out, and the rows of the patches scaled to sum to 1.
    """
    rows, columns = patch_grid(model)
    y, x = jnp.divmod(jnp.arange(rows * columns), columns)
    distance = jnp.hypot(y[:, None] - y[None, :], x[:, None] - x[None, :]) * model.patch_size
    special = weights.shape[-1] - rows * columns
    among = weights[:, :, special:, special:]
    mean = (among * distance[None, None]).sum(axis=-1) / among.sum(axis=-1)
    return mean.mean(axis=(0, 2))


def share_on_special(weights: Weights, special: int = 1) -> ByHead:
    """Share of attention on the first `special` tokens, mean over images and queries."""
    share: Array = weights[..., :special].sum(axis=-1)
    return share.mean(axis=(0, 2))


def share_on_most_read(weights: Weights, special: int = 0) -> ByHead:
    """Share of attention on the patch that an image's queries read most, mean over images."""
    return weights[..., special:].mean(axis=2).max(axis=-1).mean(axis=0)


def cka(a: Float[Array, "n p"], b: Float[Array, "n q"]) -> Float[Array, ""]:
    """Linear CKA of two sets of features of the same n examples, in [0, 1] (arXiv 1905.00414)."""
    a, b = a - a.mean(axis=0, keepdims=True), b - b.mean(axis=0, keepdims=True)
    norms = jnp.linalg.norm(a.T @ a) * jnp.linalg.norm(b.T @ b)
    similarity: Array = jnp.sum((a.T @ b) ** 2) / norms
    return similarity


def cka_matrix(
    features: Sequence[Float[Array, "n _"]] | Float[Array, "layers n p"],
    others: Sequence[Float[Array, "n _"]] | Float[Array, "others n q"] | None = None,
) -> Float[Array, "_ _"]:
    """CKA of each layer with each, or with each of another network."""
    others = features if others is None else others
    return jnp.stack([jnp.stack([cka(a, b) for b in others]) for a in features])


def layer_features(
    model: CaiT, inside: Mapping[str, Any]
) -> list[Float[Array, "batch patches width"]]:
    """The patches' features after each self-attention block."""
    rows, columns = patch_grid(model)
    blocks = inside["blocks"]
    each = [b["features"] for b in blocks] if isinstance(blocks, list) else blocks["features"]
    return [features[:, -rows * columns :] for features in each]


def branch_ratio(
    model: CaiT, variables: Mapping[str, Any], images: Images
) -> Float[Array, "blocks 2"]:
    """`||branch|| / ||x||` of attention and MLP in each block, mean over images and tokens (paper, section 2).

    The branch is what is added to the stream x, scaled as `model.residual` has it. Class-attention blocks follow
    self-attention blocks; the ratio of an MLP that a block lacks is NaN.
    """
    model = check_transformer(model)
    stream: dict[str, Any] = {}

    def record(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, name = context.module, str(context.module.name)
        if isinstance(layer, SelfAttentionBlock | ClassAttentionBlock):
            stream["x"] = args[0]
        result = call(*args, **kwargs)
        if context.method_name == "__call__" and name in ("layer_scale_1", "layer_scale_2"):
            x, stream["x"] = stream["x"], stream["x"] + result
            ratio = (jnp.linalg.norm(result, axis=-1) / jnp.linalg.norm(x, axis=-1)).mean()
            layer.sow("intermediates", "ratio", ratio, reduce_fn=lambda _, new: new)
        return result

    with nn.intercept_methods(record):
        _, mutated = model.apply(variables, images, mutable=["intermediates"])
    blocks = mutated["intermediates"]
    names = ["blocks"] if "blocks" in blocks else [f"blocks_{i}" for i in range(model.depth)]
    names += [f"blocks_token_only_{i}" for i in range(model.class_depth or 0)]

    def of(block: Any, part: str) -> Array:
        found = block.get(part, {}).get("ratio", jnp.full((1,), jnp.nan))
        return jnp.atleast_1d(found)

    return jnp.concatenate(
        [
            jnp.stack([of(blocks[n], "layer_scale_1"), of(blocks[n], "layer_scale_2")], axis=1)
            for n in names
        ]
    )
