"""A forward pass that also returns what happened inside: attention maps and features."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.models.cait import CaiT
from cait_jax.models.layers import Images
from cait_jax.models.zoo import Network


def forward_intermediates(
    model: Network, variables: Mapping[str, Any], images: Images
) -> tuple[Float[Array, "batch outputs"], dict[str, Any]]:
    """Applies the model to normalised images once, and returns intermediates beside the output.

    Returns:
      The output of `model.apply(variables, images)`, and a dict of
        `blocks`: `features` (depth, batch, tokens, width) and, of self-attention, `logits`, `softmax` and,
          with talking heads, `mixed_logits`, `mixed_softmax` (depth, batch, heads, tokens, tokens); a list
          of such dicts without the leading axis where a token joins on the way;
        `blocks_token_only`, with class attention: `features` (class_depth, batch, 1, width) and `softmax`
          (class_depth, batch, heads, 1, 1 + patches), the class token's own column first;
        `stages`, of RegNetY: a list of the stages' outputs (batch, height, width, channels);
        `features`: (batch, width), what the head reads;
        `logits_class` and `logits_distillation`, of a distilled network.
    """
    output, mutated = model.apply(variables, images, mutable=["intermediates"])
    tree = dict(mutated["intermediates"])
    if not isinstance(model, CaiT):
        stages = [tree.pop(name)["features"] for name in sorted(tree) if name != "features"]
        return output, {"stages": stages, **tree}
    if "blocks" in tree:
        tree["blocks"] = _flatten(tree["blocks"])
    else:
        blocks = [_flatten(tree.pop(f"blocks_{i}")) for i in range(model.depth)]
        tree["blocks"] = blocks if isinstance(model.class_token, int) else _stack(blocks)
    token_only = [
        _flatten(tree.pop(f"blocks_token_only_{i}")) for i in range(model.class_depth or 0)
    ]
    if token_only:
        tree["blocks_token_only"] = _stack(token_only)
    return output, tree


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _flatten(block: Mapping[str, Any]) -> dict[str, Array]:
    return {"features": block["features"], **block["attn"]}
