"""The kernels as one differentiable function."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.axes import by_device
from cait_jax.kernels import gpu, tpu

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
    attention = by_device(_differentiable(platform, precision, interpret), 3)
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

    def keep(*arguments: Any) -> tuple[Any, Any]:
        q, k, v, pre, _, post, post_bias = arguments
        out, kept = forward(q, k, v, pre, post, post_bias)
        return out, (arguments, kept)

    def gradients(residuals: Any, gradient: Any) -> tuple[Any, ...]:
        (q, k, v, pre, pre_bias, post, post_bias), kept = residuals
        dq, dk, dv, d_pre, d_post = backward(q, k, v, pre, post, post_bias, kept, gradient)
        # The bias adds itself to every weight of a query: to the output, times the sum of all values.
        wide = jnp.promote_types(v.dtype, jnp.float32)
        values, errors = v.sum(axis=1, dtype=wide), gradient.sum(axis=1, dtype=wide)
        d_post_bias = (values * errors).sum(axis=(0, 2))
        return (
            dq,
            dk,
            dv,
            d_pre.sum(axis=0).astype(pre.dtype),
            jnp.zeros_like(pre_bias),
            d_post.sum(axis=0).astype(post.dtype),
            d_post_bias.astype(post_bias.dtype),
        )

    attention.defvjp(keep, gradients)
    return attention
