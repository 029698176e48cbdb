"""The two kinds of attention: among all tokens, with talking heads or without, and class attention."""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import LINEAR_INIT, Dropout, ExampleIds, Numerics, Tokens, record
from cait_jax.models.residual import Residual

Maps = Float[Array, "batch heads queries keys"]


class HeadMixing(nn.Module):
    """A linear map with bias over the head axis of attention maps (Shazeer et al., arXiv 2003.02436)."""

    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, maps: Maps) -> Maps:
        """Returns `out[:, g] = sum_h maps[:, h] * kernel[h, g] + bias[g]` in the dtype of `maps`."""
        heads = maps.shape[1]
        kernel = self.param("kernel", LINEAR_INIT, (heads, heads), self.numerics.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (heads,), self.numerics.param_dtype)
        mixed = jnp.einsum(
            "bhqk,hg->bgqk", maps, kernel.astype(maps.dtype), precision=self.numerics.precision
        )
        return mixed + bias.astype(maps.dtype)[None, :, None, None]


class SelfAttention(nn.Module):
    """Self-attention whose heads are mixed before (`proj_l`) and after (`proj_w`) the softmax.

    Records `logits`, `mixed_logits`, `softmax` and `mixed_softmax`, each (batch, heads, queries, keys);
    without talking heads, `logits` and `softmax`.

    Attributes:
      num_heads: heads H; the width must be a multiple of it.
      talking_heads: whether heads are mixed, or each goes alone, as in ViT.
      attention_dropout: rate on the (mixed) softmax.
      projection_dropout: rate after the last projection.
      residual: how the branch's linear layers start.
    """

    num_heads: int
    talking_heads: bool = True
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    residual: Residual = Residual()

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Attends from every token to every token; (batch, tokens, width) in and out."""
        batch, tokens, width = x.shape
        head_dim = width // self.num_heads
        numerics = self.residual.numerics

        qkv = self.residual.linear(x, 3 * width, "qkv")
        qkv = qkv.reshape(batch, tokens, 3, self.num_heads, head_dim)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]

        logits = _dot_products(q * head_dim**-0.5, k, numerics)
        record(self, "logits", logits)
        if self.talking_heads:
            logits = HeadMixing(numerics, name="proj_l")(logits)
            record(self, "mixed_logits", logits)
        maps = nn.softmax(logits, axis=-1)
        record(self, "softmax", maps)
        if self.talking_heads:
            maps = HeadMixing(numerics, name="proj_w")(maps)
            record(self, "mixed_softmax", maps)

        maps = Dropout(self.attention_dropout, name="attn_drop")(maps, example_ids)
        out = self.residual.linear(_weighted_sum(maps, v, numerics), width, "proj")
        return Dropout(self.projection_dropout, name="proj_drop")(out, example_ids)


class ClassAttention(nn.Module):
    """Attention of the class token to itself and the patches (paper, section 3, equations 5 to 7).

    Records `softmax`, (batch, heads, 1, 1 + patches).
    """

    num_heads: int
    residual: Residual = Residual()

    @nn.compact
    def __call__(self, u: Float[Array, "batch all_tokens d"]) -> Float[Array, "batch 1 d"]:
        """Returns the class token's update.

        Args:
          u: class token at position 0, then the patches.
        """
        batch, tokens, width = u.shape
        head_dim = width // self.num_heads
        numerics, linear = self.residual.numerics, self.residual.linear

        q = linear(u[:, :1], width, "q").reshape(batch, 1, self.num_heads, head_dim)
        k = linear(u, width, "k").reshape(batch, tokens, self.num_heads, head_dim)
        v = linear(u, width, "v").reshape(batch, tokens, self.num_heads, head_dim)

        softmax = nn.softmax(_dot_products(q * head_dim**-0.5, k, numerics), axis=-1)
        record(self, "softmax", softmax)
        return linear(_weighted_sum(softmax, v, numerics), width, "proj")


def _dot_products(q: Any, k: Any, numerics: Numerics) -> Array:
    """(batch, queries, heads, dim) and (batch, keys, heads, dim) to wide (batch, heads, queries, keys)."""
    return jnp.einsum(
        "bqhc,bkhc->bhqk",
        q,
        k,
        precision=numerics.precision,
        preferred_element_type=numerics.wide,
    )


def _weighted_sum(weights: Any, v: Any, numerics: Numerics) -> Array:
    """(batch, heads, queries, keys) and (batch, keys, heads, dim) to (batch, queries, heads * dim)."""
    out = jnp.einsum("bhqk,bkhc->bqhc", weights.astype(v.dtype), v, precision=numerics.precision)
    return out.reshape(*out.shape[:2], -1)
