"""The two kinds of attention: among all tokens, with talking heads or without, and class attention."""

import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cait_jax.kernels.talking_heads import (
    attention_logits,
    mix_heads,
    talking_heads_attention,
    weighted_sum,
)
from cait_jax.models.layers import (
    LINEAR_INIT,
    PRODUCT,
    Dropout,
    ExampleIds,
    Numerics,
    Tokens,
    record,
)
from cait_jax.models.residual import Residual


class HeadMixing(nn.Module):
    """Weights of a linear map with bias over the heads of attention maps (Shazeer et al., arXiv 2003.02436)."""

    heads: int
    numerics: Numerics = Numerics()

    @nn.compact
    def weights(self) -> tuple[Float[Array, "heads heads"], Float[Array, "heads"]]:
        """Returns kernel (from, to) and bias, for `mix_heads`."""
        dtype = self.numerics.param_dtype
        kernel = self.param("kernel", LINEAR_INIT, (self.heads, self.heads), dtype)
        return kernel, self.param("bias", nn.initializers.zeros, (self.heads,), dtype)


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
      implementation: of `cait_jax.kernels.talking_heads_attention`; the maps are computed one by one where they
        are dropped, recorded or not mixed.
    """

    num_heads: int
    talking_heads: bool = True
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    residual: Residual = Residual()
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Attends from every token to every token; (batch, tokens, width) in and out."""
        batch, tokens, width = x.shape
        head_dim = width // self.num_heads
        numerics = self.residual.numerics

        scale = head_dim**-0.5
        # Parted before heads are told apart: on TPUs an array with head_dim 48 last is filled up to 128.
        q, k, v = jnp.split(self.residual.linear(x, 3 * width, "qkv"), 3, axis=-1)
        if not self.talking_heads:
            q = q * scale
        q, k, v = (part.reshape(batch, tokens, self.num_heads, head_dim) for part in (q, k, v))
        if self.talking_heads:
            pre_weight, pre_bias = HeadMixing(self.num_heads, numerics, name="proj_l").weights()
            pre = pre_weight * scale, pre_bias  # a few numbers are scaled instead of every query
            post = HeadMixing(self.num_heads, numerics, name="proj_w").weights()
        dropped = self.attention_dropout > 0.0 and example_ids is not None
        recorded = self.is_initializing() or self.is_mutable_collection("intermediates")
        if self.talking_heads and not dropped and not recorded:
            out = talking_heads_attention(
                q, k, v, *pre, *post,
                implementation=self.implementation, precision=numerics.precision,
            )  # fmt: skip
            out = checkpoint_name(out, PRODUCT)
        else:
            maps = attention_logits(q, k, numerics.precision)
            record(self, "logits", maps * scale if self.talking_heads else maps)
            if self.talking_heads:
                maps = mix_heads(maps, *pre, numerics.precision)
                record(self, "mixed_logits", maps)
            maps = nn.softmax(maps, axis=-1)
            record(self, "softmax", maps)
            if self.talking_heads:
                maps = mix_heads(maps, *post, numerics.precision)
                record(self, "mixed_softmax", maps)
            maps = Dropout(self.attention_dropout, name="attn_drop")(maps, example_ids)
            out = weighted_sum(maps, v, numerics.precision)

        out = self.residual.linear(out.reshape(batch, tokens, width), width, "proj")
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

        logits = attention_logits(q * head_dim**-0.5, k, numerics.precision)
        softmax = nn.softmax(logits, axis=-1)
        record(self, "softmax", softmax)
        out = weighted_sum(softmax, v, numerics.precision)
        return linear(out.reshape(batch, 1, width), width, "proj")
