"""Talking-heads attention (Shazeer et al., arXiv 2003.02436) as one function with several implementations."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.kernels import gpu, tpu
from cait_jax.sharding import shard_over_batch

# Name to whose kernels, and whether XLA computes what is in them, on any device.
_KERNELS = {
    "pallas_tpu": ("tpu", False),
    "pallas_tpu_interpreted": ("tpu", True),
    "pallas_gpu": ("gpu", False),
    "pallas_gpu_interpreted": ("gpu", True),
}
IMPLEMENTATIONS = ("xla", "xla_remat", "xla_by_image", *_KERNELS)
# By platform; what is not named here has none that is known to be better.
_DEFAULTS = {"tpu": "pallas_tpu", "cpu": "xla_by_image"}
# Numbers in an image's maps, up to which a turn of a loop takes longer than it saves.
SMALL_MAPS = 1024

ByToken = Float[Array, "batch tokens heads dim"]
ByQuery = Float[Array, "*batch queries heads dim"]
ByKey = Float[Array, "*batch keys heads dim"]
Maps = Float[Array, "*batch heads queries keys"]


def default_implementation(platform: str) -> str:
    """The implementation that a platform is known to do best with.

    Args:
      platform: of a device, such as `"tpu"`, `"gpu"` or `"cpu"`.
    """
    return _DEFAULTS.get(platform, "xla")


def talking_heads_attention(
    q: ByToken,
    k: ByToken,
    v: ByToken,
    pre_weight: Float[Array, "heads heads"],
    pre_bias: Float[Array, "heads"],
    post_weight: Float[Array, "heads heads"],
    post_bias: Float[Array, "heads"],
    *,
    implementation: str | None = None,
    precision: Any = None,
) -> ByToken:
    """Attention whose heads are mixed before the softmax and after it.

    With logits `s[h] = q[h] @ k[h].T`, `p[g] = softmax(sum_h s[h] * pre_weight[h, g] + pre_bias[g])` over the
    keys, and the output is `(sum_g p[g] * post_weight[g, f] + post_bias[f]) @ v[f]`. Maps are float32 or wider.

    Args:
      q: queries, already scaled where `pre_weight` is not.
      k: keys.
      v: values.
      pre_weight: (from, to).
      pre_bias: adds the same to all logits of a query and so changes nothing; its gradient is 0.
      post_weight: (from, to).
      post_bias: by head.
      implementation: `"xla"`: plain. `"xla_remat"`: plain, with everything of size (heads, queries, keys)
        rematerialised in the backward pass. `"xla_by_image"`: as `xla_remat`, one image at a time, so that its
        maps stay in a CPU's cache; plain where maps are small. `"pallas_tpu"`, `"pallas_gpu"`: kernels in
        which nothing of that size leaves the chip; with `_interpreted`, run by XLA on any device, slowly, to
        test them. None: `default_implementation` of JAX's default backend.
      precision: of matrix products, as in `jax.lax.dot_general`.

    Returns:
      The output, in the dtype of `v`.

    Raises:
      ValueError: for an unknown implementation.
    """
    if implementation is None:
        implementation = default_implementation(jax.default_backend())
    weights = (pre_weight, pre_bias, post_weight, post_bias)
    _, tokens, heads, _ = q.shape
    small = implementation == "xla_by_image" and heads * tokens**2 <= SMALL_MAPS
    if implementation == "xla" or small:
        return _plain(q, k, v, *weights, precision=precision)
    if implementation == "xla_remat":
        lean = jax.checkpoint(functools.partial(_plain, precision=precision))
        return lean(q, k, v, *weights)
    if implementation == "xla_by_image":
        by_image = functools.partial(_by_image, precision=precision)
        return shard_over_batch(by_image, 3)(q, k, v, *weights)
    if implementation not in _KERNELS:
        raise ValueError(
            f"unknown implementation of attention {implementation!r}; there are {', '.join(IMPLEMENTATIONS)}"
        )
    platform, interpret = _KERNELS[implementation]
    return fused_attention(
        q, k, v, *weights, platform=platform, precision=precision, interpret=interpret
    )


def attention_logits(q: ByQuery, k: ByKey, precision: Any = None) -> Maps:
    """Products of queries and keys, (..., heads, queries, keys), at least float32."""
    wide = jnp.promote_types(q.dtype, jnp.float32)
    return jnp.einsum(
        "...qhc,...khc->...hqk", q, k, precision=precision, preferred_element_type=wide
    )


def mix_heads(maps: Maps, weight: Any, bias: Any, precision: Any = None) -> Maps:
    """`out[:, g] = sum_h maps[:, h] * weight[h, g] + bias[g]`, in the dtype of `maps`."""
    mixed = jnp.einsum("bhqk,hg->bgqk", maps, weight.astype(maps.dtype), precision=precision)
    return mixed + bias.astype(maps.dtype)[None, :, None, None]


def weighted_sum(maps: Maps, v: ByKey, precision: Any = None) -> ByQuery:
    """Values of the keys, weighted; in the dtype of `v`."""
    return jnp.einsum("...hqk,...khc->...qhc", maps.astype(v.dtype), v, precision=precision)


def _plain(
    q: Any, k: Any, v: Any, pre_weight: Any, pre_bias: Any, post_weight: Any, post_bias: Any, *,
    precision: Any, mix: Callable[..., Any] = mix_heads,
) -> Any:  # fmt: skip
    logits = mix(attention_logits(q, k, precision), pre_weight, pre_bias, precision)
    maps = mix(jax.nn.softmax(logits, axis=-1), post_weight, post_bias, precision)
    return weighted_sum(maps, v, precision)


def _by_image(q: Any, k: Any, v: Any, *weights: Any, precision: Any) -> Any:
    lean = jax.checkpoint(functools.partial(_plain, precision=precision, mix=_mix_heads_of_one))
    return jax.lax.map(lambda image: lean(*image, *weights), (q, k, v))


def _mix_heads_of_one(maps: Any, weight: Any, bias: Any, precision: Any) -> Any:
    """`mix_heads` of one image without an axis for it, as one product of matrices: CPUs' fastest, and back."""
    flat = maps.reshape(maps.shape[0], -1)
    mixed = jnp.matmul(weight.astype(maps.dtype).T, flat, precision=precision)
    return mixed.reshape(maps.shape) + bias.astype(maps.dtype)[:, None, None]


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
    kernels: Any = {"tpu": tpu, "gpu": gpu}[platform]
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
