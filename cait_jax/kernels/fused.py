"""The kernels as one differentiable function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.kernels import gpu, tpu
from cait_jax.sharding import shard_over_batch

_KERNELS: dict[str, Any] = {"tpu": tpu, "gpu": gpu}


def fused_attention(
    q: Any, k: Any, v: Any, pre_weight: Any, pre_bias: Any, post_weight: Any, post_bias: Any, *,
    platform: str, precision: Any, interpret: bool,
) -> Any:  # fmt: skip
    """`talking_heads_attention` by the kernels of a platform.

    Args:
      q: as for `talking_heads_attention`, with the next six.
      k: likewise.
      v: likewise.
      pre_weight: likewise.
      pre_bias: likewise; no output depends on it.
      post_weight: likewise.
      post_bias: likewise.
      platform: whose kernels: `"tpu"` or `"gpu"`.
      precision: of matrix products.
      interpret: whether XLA computes what is in them.
    """
    attention = shard_over_batch(_differentiable(platform, precision, interpret), 3)
    return attention(q, k, v, pre_weight, pre_bias, post_weight, post_bias)


@functools.cache
def _differentiable(platform: str, precision: Any, interpret: bool) -> Callable[..., Any]:
    options = {"precision": precision, "interpret": interpret}
    kernels = _KERNELS[platform]
    forward = functools.partial(kernels.forward, **options)
    backward = functools.partial(kernels.backward, **options)

    @jax.custom_vjp
    def attention(
        q: Any, k: Any, v: Any, pre: Any, pre_bias: Any, post: Any, post_bias: Any
    ) -> Any:
        del pre_bias
        return forward(q, k, v, pre, post, post_bias)[0]

    def keep(
        q: Any, k: Any, v: Any, pre: Any, pre_bias: Any, post: Any, post_bias: Any
    ) -> tuple[Any, Any]:
        out, kept = forward(q, k, v, pre, post, post_bias)
        return out, (kept, pre, pre_bias, post, post_bias)

    def gradients(residuals: Any, gradient: Any) -> tuple[Any, ...]:
        kept, pre, pre_bias, post, post_bias = residuals
        *by_token, d_pre, d_post, d_bias = backward(kept, pre, post, post_bias, gradient)
        return (
            *by_token,
            d_pre.sum(axis=0).astype(pre.dtype),
            jnp.zeros_like(pre_bias),
            d_post.sum(axis=0).astype(post.dtype),
            d_bias.sum(axis=0).astype(post_bias.dtype),
        )

    attention.defvjp(keep, gradients)
    return attention
