"""Talking-heads attention as GPU kernels, in Pallas for Triton: one forward, two backward.

A program takes a tile of queries, or of keys, and meets the tiles of the other one by one with all heads, so that
nothing of size (heads, queries, keys) leaves the chip. Softmaxes must be whole before they can be mixed: the first
pass over the keys finds each row's maximum and sum, the second recomputes the maps and uses them. Triton's sides
are powers of two, so head_dim 48 is padded to 64.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from cait_jax.kernels import HIDDEN, dot, mixture

TILE = 16  # queries, keys; also the least side of a matmul on tensor cores


def forward(
    q: Any, k: Any, v: Any, pre_weight: Any, post_weight: Any, post_bias: Any, *, precision: Any,
    interpret: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """`talking_heads_attention` without `pre_bias`, on which no output depends.

    Returns the output and what `backward` needs: q, k, v and the logarithm of each softmax's sum, float32 (batch,
    heads, padded tokens).
    """
    batch, tokens, heads, dim = q.shape
    flat = [_padded(x) for x in (q, k, v)]
    _, padded, _, wide = flat[0].shape
    out, sums = pl.pallas_call(
        functools.partial(_forward_kernel, heads=heads, tokens=tokens, precision=precision),
        grid=(batch, padded // TILE),
        in_specs=[*_small(pre_weight, post_weight, post_bias), *[_image(padded, heads, wide)] * 3],
        out_specs=[_tile(heads, wide), _rows(heads)],
        out_shape=[
            jax.ShapeDtypeStruct(flat[2].shape, v.dtype),
            jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32),
        ],
        compiler_params=_parameters(heads),
        cost_estimate=_cost(q.shape, v.dtype, products=3, mixtures=3, arrays=4),
        interpret=interpret,
        name="talking_heads",
    )(*map(_wide, (pre_weight, post_weight, post_bias)), *flat)
    return out[:, :tokens, :, :dim], (q, k, v, sums)


def backward(
    kept: tuple[Any, ...], pre_weight: Any, post_weight: Any, post_bias: Any, gradient: Any, *,
    precision: Any, interpret: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of q, k and v, and by image, in float32, those of `pre_weight`, `post_weight` and `post_bias`."""
    q, k, v, sums = kept
    batch, tokens, heads, dim = q.shape
    flat = [_padded(x) for x in (q, k, v, gradient)]
    _, padded, _, wide = flat[0].shape
    tiles, side = padded // TILE, _power(heads)
    weights = [_wide(x) for x in (pre_weight, post_weight, post_bias)]
    options: dict[str, Any] = {
        "grid": (batch, tiles),
        "compiler_params": _parameters(heads),
        "interpret": interpret,
    }
    by_row = jax.ShapeDtypeStruct((batch, heads, padded), jnp.float32)
    by_tile = jax.ShapeDtypeStruct((batch, tiles, side, side), jnp.float32)
    square = pl.BlockSpec((None, None, side, side), lambda b, i: (b, i, 0, 0))
    every_row = pl.BlockSpec((None, heads, padded), lambda b, i: (b, 0, 0))
    shared = [*_small(pre_weight, post_weight, post_bias), *[_image(padded, heads, wide)] * 4]
    sizes: dict[str, Any] = {"heads": heads, "tokens": tokens, "precision": precision}

    dq, dots, d_pre, d_post = pl.pallas_call(
        functools.partial(_query_kernel, **sizes),
        in_specs=[*shared, every_row],
        out_specs=[_tile(heads, wide), _rows(heads), square, square],
        out_shape=[jax.ShapeDtypeStruct(flat[0].shape, q.dtype), by_row, by_tile, by_tile],
        cost_estimate=_cost(q.shape, q.dtype, products=5, mixtures=9, arrays=5),
        name="talking_heads_query_gradient",
        **options,
    )(*weights, *flat, sums)
    dk, dv = pl.pallas_call(
        functools.partial(_key_kernel, **sizes),
        in_specs=[*shared, every_row, every_row],
        out_specs=[_tile(heads, wide)] * 2,
        out_shape=[jax.ShapeDtypeStruct(flat[1].shape, x.dtype) for x in (k, v)],
        cost_estimate=_cost(q.shape, q.dtype, products=4, mixtures=4, arrays=6),
        name="talking_heads_key_gradient",
        **options,
    )(*weights, *flat, sums, dots)
    by_token = (x[:, :tokens, :, :dim] for x in (dq, dk, dv))
    by_head = (x.sum(axis=1)[:, :heads, :heads] for x in (d_pre, d_post))
    # The bias adds itself to every weight of a query: to the output, times the sum of all values.
    values, errors = (x.sum(axis=1, dtype=jnp.float32) for x in (v, gradient))
    return *by_token, *by_head, (values * errors).sum(axis=-1)


def _wide(weight: Any) -> Any:
    return weight.astype(jnp.float32)


def _power(number: int) -> int:
    """The next power of two that a side of a matmul may have."""
    return max(TILE, 1 << (number - 1).bit_length())


def _padded(x: Any) -> Any:
    """Padded to whole tiles of tokens, and to a power of two channels a head."""
    _, tokens, _, dim = x.shape
    return jnp.pad(x, ((0, 0), (0, -tokens % TILE), (0, 0), (0, _power(dim) - dim)))


def _small(*weights: Any) -> list[pl.BlockSpec]:
    """Whole arrays, of which single numbers are read."""
    return [pl.BlockSpec(w.shape, lambda b, i, rank=w.ndim: (0,) * rank) for w in weights]


def _image(padded: int, heads: int, wide: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, padded, heads, wide), lambda b, i: (b, 0, 0, 0))


def _tile(heads: int, wide: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, TILE, heads, wide), lambda b, i: (b, i, 0, 0))


def _rows(heads: int) -> pl.BlockSpec:
    return pl.BlockSpec((None, heads, TILE), lambda b, i: (b, 0, i))


def _parameters(heads: int) -> Any:
    return triton.CompilerParams(num_warps=4 if heads <= 8 else 8, num_stages=1)


def _cost(
    shape: tuple[int, ...], dtype: Any, *, products: int, mixtures: int, arrays: int
) -> pl.CostEstimate:
    batch, tokens, heads, dim = shape
    pairs = batch * heads * tokens * tokens
    return pl.CostEstimate(
        flops=2 * pairs * (products * dim + mixtures * heads),
        transcendentals=2 * pairs,
        bytes_accessed=arrays * batch * tokens * heads * dim * jnp.dtype(dtype).itemsize,
    )


class _Pair:
    """A tile of queries and a tile of keys: the maps of all heads between them, (queries, keys) each."""

    def __init__(self, pre: Any, q_ref: Any, k_ref: Any, i: Any, j: Any, *, heads: int, tokens: int,
                 precision: Any) -> None:  # fmt: skip
        self.heads, self.precision = range(heads), precision
        self.queries, self.keys = pl.ds(i * TILE, TILE), pl.ds(j * TILE, TILE)
        self.logits = self.products(q_ref, k_ref)
        key = j * TILE + jax.lax.broadcasted_iota(jnp.int32, (TILE, TILE), 1)
        self.mixed = [
            jnp.where(key < tokens, mixture(pre, self.logits, to), HIDDEN) for to in self.heads
        ]

    def products(self, rows_ref: Any, columns_ref: Any) -> list[Any]:
        """Of what belongs to the queries and what belongs to the keys."""
        return [
            dot(rows_ref[self.queries, h, :], columns_ref[self.keys, h, :], (1, 1), self.precision)
            for h in self.heads
        ]

    def softmaxes(self, sums_ref: Any) -> list[Any]:
        """From the sums that a pass over all keys gave."""
        return [jnp.exp(self.mixed[h] - sums_ref[h, self.queries][:, None]) for h in self.heads]


def _forward_kernel(
    pre: Any, post: Any, post_bias: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, sums_ref: Any, *,
    heads: int, tokens: int, precision: Any,
) -> None:  # fmt: skip
    i, wide = pl.program_id(1), q_ref.shape[-1]
    tiles = -(-tokens // TILE)
    pair = functools.partial(
        _Pair, pre, q_ref, k_ref, i, heads=heads, tokens=tokens, precision=precision
    )

    def measure(j: Any, carry: Any) -> Any:
        largest, total = carry
        mixed = pair(j).mixed
        larger = [jnp.maximum(m, x.max(axis=1)) for m, x in zip(largest, mixed, strict=True)]
        total = [
            t * jnp.exp(m - n) + jnp.exp(x - n[:, None]).sum(axis=1)
            for t, m, n, x in zip(total, largest, larger, mixed, strict=True)
        ]
        return larger, total

    none = [jnp.full((TILE,), HIDDEN, jnp.float32)] * heads
    largest, total = jax.lax.fori_loop(
        0, tiles, measure, (none, [jnp.zeros((TILE,), jnp.float32)] * heads)
    )
    sums = [m + jnp.log(t) for m, t in zip(largest, total, strict=True)]

    def use(j: Any, out: Any) -> Any:
        here = pair(j)
        maps = [jnp.exp(x - s[:, None]) for x, s in zip(here.mixed, sums, strict=True)]
        for to in here.heads:
            weights = (mixture(post, maps, to) + post_bias[to]).astype(v_ref.dtype)
            out[to] += dot(weights, v_ref[here.keys, to, :], (1, 0), precision)
        return out

    out = jax.lax.fori_loop(0, tiles, use, [jnp.zeros((TILE, wide), jnp.float32)] * heads)
    for head in range(heads):
        out_ref[:, head, :] = out[head].astype(out_ref.dtype)
        sums_ref[head, :] = sums[head]


def _query_kernel(
    pre: Any, post: Any, post_bias: Any, q_ref: Any, k_ref: Any, v_ref: Any, gradient_ref: Any, sums_ref: Any,
    dq_ref: Any, dots_ref: Any, dpre_ref: Any, dpost_ref: Any, *, heads: int, tokens: int, precision: Any,
) -> None:  # fmt: skip
    """The gradient of a tile of queries, its part of the weights', and what a softmax's gradients share."""
    del post_bias
    i, wide, side = pl.program_id(1), q_ref.shape[-1], dpre_ref.shape[-1]
    tiles = -(-tokens // TILE)
    pair = functools.partial(
        _Pair, pre, q_ref, k_ref, i, heads=heads, tokens=tokens, precision=precision
    )

    def through_maps(j: Any) -> tuple[_Pair, list[Any], list[Any], list[Any]]:
        here = pair(j)
        d_maps = here.products(gradient_ref, v_ref)
        d_softmaxes = [mixture(post, d_maps, h, transposed=True) for h in here.heads]
        return here, here.softmaxes(sums_ref), d_maps, d_softmaxes

    def measure(j: Any, dots: Any) -> Any:
        _, softmaxes, _, d_softmaxes = through_maps(j)
        both = zip(dots, softmaxes, d_softmaxes, strict=True)
        return [dot + (p * d).sum(axis=1) for dot, p, d in both]

    dots = jax.lax.fori_loop(0, tiles, measure, [jnp.zeros((TILE,), jnp.float32)] * heads)

    def use(j: Any, carry: Any) -> Any:
        dq, d_pre, d_post = carry
        here, softmaxes, d_maps, d_softmaxes = through_maps(j)
        d_logits = [
            p * (d - dot[:, None]) for p, d, dot in zip(softmaxes, d_softmaxes, dots, strict=True)
        ]
        for h in here.heads:
            d_product = mixture(pre, d_logits, h, transposed=True).astype(k_ref.dtype)
            dq[h] += dot(d_product, k_ref[here.keys, h, :], (1, 0), precision)
        d_pre += _between(here.logits, d_logits, side, precision)
        d_post += _between(softmaxes, d_maps, side, precision)
        return dq, d_pre, d_post

    square = jnp.zeros((side, side), jnp.float32)
    start = ([jnp.zeros((TILE, wide), jnp.float32)] * heads, square, square)
    dq, d_pre, d_post = jax.lax.fori_loop(0, tiles, use, start)
    for head in range(heads):
        dq_ref[:, head, :] = dq[head].astype(dq_ref.dtype)
        dots_ref[head, :] = dots[head]
    dpre_ref[...], dpost_ref[...] = d_pre, d_post


def _between(first: list[Any], second: list[Any], side: int, precision: Any) -> Any:
    """Sums over all pairs of the products of each of the first with each of the second, (side, side)."""
    return dot(_side_by_side(first, side), _side_by_side(second, side), (0, 0), precision)


def _side_by_side(maps: list[Any], side: int) -> Any:
    """Maps (rows, keys) as columns: (rows * keys, side). Triton joins two arrays at a time."""
    maps = [*maps, *[jnp.zeros_like(maps[0])] * (side - len(maps))]
    while len(maps) > 1:  # the halves apart: what is joined last lies next to each other
        half = len(maps) // 2
        pairs = zip(maps[:half], maps[half:], strict=True)
        joined = [jnp.concatenate([x[..., None], y[..., None]], axis=-1) for x, y in pairs]
        maps = [x.reshape(TILE, TILE, -1) for x in joined]
    return maps[0].reshape(TILE * TILE, side)


def _key_kernel(
    pre: Any, post: Any, post_bias: Any, q_ref: Any, k_ref: Any, v_ref: Any, gradient_ref: Any, sums_ref: Any,
    dots_ref: Any, dk_ref: Any, dv_ref: Any, *, heads: int, tokens: int, precision: Any,
) -> None:  # fmt: skip
    """The gradients of a tile of keys and values."""
    j, wide = pl.program_id(1), q_ref.shape[-1]
    tiles = -(-tokens // TILE)

    def use(i: Any, carry: Any) -> Any:
        dk, dv = carry
        here = _Pair(pre, q_ref, k_ref, i, j, heads=heads, tokens=tokens, precision=precision)
        softmaxes, d_maps = here.softmaxes(sums_ref), here.products(gradient_ref, v_ref)
        d_logits = []
        for h in here.heads:
            weights = (mixture(post, softmaxes, h) + post_bias[h]).astype(gradient_ref.dtype)
            dv[h] += dot(weights, gradient_ref[here.queries, h, :], (0, 0), precision)
            d_softmax = mixture(post, d_maps, h, transposed=True)
            d_logits.append(softmaxes[h] * (d_softmax - dots_ref[h, here.queries][:, None]))
        for h in here.heads:
            d_product = mixture(pre, d_logits, h, transposed=True).astype(q_ref.dtype)
            dk[h] += dot(d_product, q_ref[here.queries, h, :], (0, 0), precision)
        return dk, dv

    zeros = [jnp.zeros((TILE, wide), jnp.float32)] * heads
    dk, dv = jax.lax.fori_loop(0, tiles, use, (zeros, zeros))
    for head in range(heads):
        dk_ref[:, head, :] = dk[head].astype(dk_ref.dtype)
        dv_ref[:, head, :] = dv[head].astype(dv_ref.dtype)
