"""Talking-heads attention (Shazeer et al., arXiv 2003.02436) as one function with several implementations."""

import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.sharding import shard_over_batch

# Name to whether XLA computes what is in the kernels, on any device.
_TPU_KERNELS = {"pallas_tpu": False, "pallas_tpu_interpreted": True}
IMPLEMENTATIONS = ("xla", "xla_remat", "xla_by_image", *_TPU_KERNELS, "pallas_gpu")
DEFAULT_ATTENTION = {"tpu": "pallas_tpu", "cpu": "xla_by_image"}  # by platform; of others "xla"
SMALL_MAPS = 1024  # elements of an image's maps, up to which looping over images does not pay

ByToken = Float[Array, "batch tokens heads dim"]


def talking_heads_attention(
    q: ByToken,
    k: ByToken,
    v: ByToken,
    pre_weight: Float[Array, "heads heads"],
    pre_bias: Float[Array, "heads"],
    post_weight: Float[Array, "heads heads"],
    post_bias: Float[Array, "heads"],
    *,
    implementation: str,
    precision: Any = None,
) -> ByToken:
    """Attention whose heads are mixed before the softmax and after it.

    With logits `s[h] = q[h] @ k[h].T`, `p[g] = softmax(sum_h s[h] * pre_weight[h, g] + pre_bias[g])` over the
    keys, and the output is `(sum_g p[g] * post_weight[g, f] + post_bias[f]) @ v[f]`, in the dtype of `v`. Maps are
    float32 or wider. `pre_bias` adds the same to all logits of a query and so changes nothing.

    Args:
      q: queries, already scaled where `pre_weight` is not.
      implementation: `"xla"`: plain, as in `models/cait.py`. `"xla_remat"`: plain, with everything of size (heads,
        queries, keys) rematerialised in the backward pass. `"xla_by_image"`: as `xla_remat`, one image at a
        time, so that its maps stay in a CPU's cache. `"pallas_tpu"`: kernels in which nothing of that size leaves
        the chip; with `_interpreted`, run by XLA on any device, slowly, to test them. `"pallas_gpu"`: such
        kernels on Hopper GPUs; what they do not take, or their gradient does not, is `"xla_remat"`'s, which is
        logged once.
      precision: of matmuls, as in `jax.lax.dot_general`.

    Raises:
      ValueError: for an unknown implementation.
    """
    attention: Callable[..., Any] = functools.partial(_plain, precision=precision)
    if implementation == "xla_remat":
        attention = jax.checkpoint(attention)
    elif implementation == "xla_by_image":
        attention = shard_over_batch(functools.partial(_by_image, precision=precision), 3)
    elif implementation in _TPU_KERNELS:
        attention = shard_over_batch(_on_tpu(precision, _TPU_KERNELS[implementation]), 3)
    elif implementation == "pallas_gpu":
        attention = _on_gpu_or_plain(q, k, v, precision)
    elif implementation != "xla":
        raise ValueError(
            f"unknown implementation of attention {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    out: ByToken = attention(q, k, v, pre_weight, pre_bias, post_weight, post_bias)
    return out


def _plain(
    q: Any, k: Any, v: Any, pre_weight: Any, pre_bias: Any, post_weight: Any, post_bias: Any, *,
    precision: Any, mix: Callable[..., Any] | None = None,
) -> Any:  # fmt: skip
    """Of a batch, or with `_mix_heads_of_one` of one image without an axis for it."""
    mix = mix or _mix_heads
    wide = jnp.promote_types(q.dtype, jnp.float32)
    logits = jnp.einsum(
        "...qhc,...khc->...hqk", q, k, precision=precision, preferred_element_type=wide
    )
    softmax = jax.nn.softmax(mix(logits, pre_weight, pre_bias, precision), axis=-1)
    maps = mix(softmax, post_weight, post_bias, precision)
    return jnp.einsum("...hqk,...khc->...qhc", maps.astype(v.dtype), v, precision=precision)


def _mix_heads(maps: Any, weight: Any, bias: Any, precision: Any) -> Any:
    mixed = jnp.einsum("bhqk,hg->bgqk", maps, weight.astype(maps.dtype), precision=precision)
    return mixed + bias.astype(maps.dtype)[None, :, None, None]


def _mix_heads_of_one(maps: Any, weight: Any, bias: Any, precision: Any) -> Any:
    """`_mix_heads` of one image as a single matmul: CPUs' fastest, in both directions."""
    flat = maps.reshape(maps.shape[0], -1)
    mixed = jnp.matmul(weight.astype(maps.dtype).T, flat, precision=precision)
    return mixed.reshape(maps.shape) + bias.astype(maps.dtype)[:, None, None]


def _by_image(q: Any, k: Any, v: Any, *weights: Any, precision: Any) -> Any:
    of_one = functools.partial(_plain, precision=precision, mix=_mix_heads_of_one)
    remat = jax.checkpoint(of_one)
    return jax.lax.map(lambda image: remat(*image, *weights), (q, k, v))


@functools.cache
def _on_tpu(precision: Any, interpret: bool) -> Callable[..., Any]:
    """The kernels with the derivative that they compute; no output depends on `pre_bias`."""
    kernels: Any
    from cait_jax.kernels import tpu as kernels

    forward, backward = (
        functools.partial(kernel, precision=precision, interpret=interpret)
        for kernel in (kernels.forward, kernels.backward)
    )

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


def _on_gpu_or_plain(q: Any, k: Any, v: Any, precision: Any) -> Callable[..., Any]:
    from cait_jax.kernels.gpu_plan import refusal

    reason = refusal(q, k, v)
    if reason is None:
        return shard_over_batch(on_gpu(precision), 3)
    _log_once(f"attention pallas_gpu runs as xla_remat: {reason}")
    return jax.checkpoint(functools.partial(_plain, precision=precision))


@functools.cache
def _log_once(line: str) -> None:
    logging.getLogger(__name__).warning(line)


@functools.cache
def on_gpu(precision: Any, *, interpret: bool = False) -> Callable[..., Any]:
    """The kernels; a gradient that they do not take is that of the plain way, in `precision`, computed again."""
    from cait_jax.kernels import gpu
    from cait_jax.kernels.gpu_plan import backward_refusal

    @jax.custom_vjp
    def attention(
        q: Any, k: Any, v: Any, pre: Any, pre_bias: Any, post: Any, post_bias: Any
    ) -> Any:
        del pre_bias
        return gpu.forward(q, k, v, pre, post, post_bias, interpret=interpret)[0]

    def keep(*given: Any) -> tuple[Any, Any]:
        q, k, v, pre, _, post, post_bias = given
        reason = backward_refusal(q, interpret=interpret)
        if reason is not None:
            _log_once(f"attention pallas_gpu has the gradient of xla_remat: {reason}")
            return attention(*given), (given, None)
        out, sums = gpu.forward(q, k, v, pre, post, post_bias, keep_sums=True, interpret=interpret)
        return out, (given, sums)

    def gradients(residuals: Any, gradient: Any) -> tuple[Any, ...]:
        given, sums = residuals
        if sums is None:
            _, back = jax.vjp(functools.partial(_plain, precision=precision), *given)
            plain: tuple[Any, ...] = back(gradient)
            return plain
        from cait_jax.kernels import gpu_backward

        q, k, v, pre, pre_bias, post, post_bias = given
        *by_token, d_pre, d_post, d_bias = gpu_backward.backward(
            q, k, v, pre, post, post_bias, sums, gradient, interpret=interpret
        )
        return *by_token, d_pre, jnp.zeros_like(pre_bias), d_post, d_bias

    attention.defvjp(keep, gradients)
    return attention
