"""Talking-heads attention as one TPU kernel each way, in Pallas.

All heads of a tile of queries meet all keys on the chip: logits, their mixture, softmax, its mixture and the
weighted sum, so that nothing of size (heads, queries, keys) is written to HBM. The backward kernel recomputes all
of it from q, k and v. Heads are mixed on the vector unit, a few rows at a time: one row of
registers of each head, and H x H multiply-adds between them.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from cait_jax.kernels import HIDDEN, dot, mixture

ROWS, LANES = 8, 128  # of a vector register
# What the arrays of a tile of queries may take of VMEM, and what all may.
TILE_BYTES = 12 * 2**20
LIMIT_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How queries are tiled; each tile has all keys."""

    queries: int  # in a tile
    tiles: int
    tokens: int  # without padding
    heads: int
    dim: int  # of a head

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.dim

    @property
    def padded(self) -> int:
        """Tokens with the padding of the last tile."""
        return self.queries * self.tiles

    @property
    def rows(self) -> int:
        """Queries of a tile, padded to whole registers."""
        return -(-self.queries // ROWS) * ROWS

    def queries_of(self, tile: Any) -> Any:
        """The slice of a tile among all tokens."""
        if self.tiles == 1:
            return slice(None)
        return pl.ds(pl.multiple_of(tile * self.queries, ROWS), self.queries)

    def of_head(self, head: int, part: int = 0) -> slice:
        """The channels of a head; of a packed array, part 0 is queries, 1 keys, 2 values."""
        start = part * self.width + head * self.dim
        return slice(start, start + self.dim)


def tiling(tokens: int, heads: int, dim: int, arrays: int) -> Tiling:
    """Tiles queries so that `arrays` of (heads, queries, keys) fit in VMEM."""
    by_row = arrays * heads * -(-tokens // LANES) * LANES * 4
    most = max(ROWS, TILE_BYTES // by_row // ROWS * ROWS)
    if tokens <= most:
        return Tiling(tokens, 1, tokens, heads, dim)
    whole = [size for size in range(ROWS, most + 1, ROWS) if tokens % size == 0]
    size = max(whole, default=0)
    if 2 * size < most:  # rather a few padded rows than small tiles
        tiles = -(-tokens // most)
        size = -(-tokens // (tiles * ROWS)) * ROWS
    return Tiling(size, -(-tokens // size), tokens, heads, dim)


def forward(
    q: Any, k: Any, v: Any, pre_weight: Any, post_weight: Any, post_bias: Any, *, precision: Any,
    interpret: bool,
) -> tuple[Any, Any]:  # fmt: skip
    """`talking_heads_attention` without `pre_bias`, on which no output depends.

    Returns the output and what `backward` needs: q, k and v side by side, (batch, tokens, 3 * heads * dim).
    """
    batch, tokens, heads, dim = q.shape
    cut = tiling(tokens, heads, dim, arrays=3)
    packed = jnp.concatenate([x.reshape(batch, tokens, cut.width) for x in (q, k, v)], axis=-1)
    out = pl.pallas_call(
        functools.partial(_forward_kernel, cut=cut, precision=precision),
        grid=(batch, cut.tiles),
        in_specs=[_SCALARS, _SCALARS, _SCALARS, _image(cut)],
        out_specs=_tile(cut),
        out_shape=jax.ShapeDtypeStruct((batch, cut.padded, cut.width), v.dtype),
        scratch_shapes=[pltpu.VMEM((heads, cut.rows, cut.padded), jnp.float32)],
        cost_estimate=cost_estimate(q.shape, v.dtype, backward=False),
        compiler_params=_parameters(),
        interpret=interpret,
        name="talking_heads",
    )(*map(_scalars, (pre_weight, post_weight, post_bias)), _padded(packed, cut))
    return out[:, :tokens].reshape(q.shape), packed


def backward(
    packed: Any, pre_weight: Any, post_weight: Any, post_bias: Any, gradient: Any, *, precision: Any,
    interpret: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of q, k and v, and by image, in float32, those of `pre_weight`, `post_weight` and `post_bias`."""
    batch, tokens, heads, dim = gradient.shape
    cut = tiling(tokens, heads, dim, arrays=4)
    square, row = (heads, heads), (1, heads)
    by_image = [
        pl.BlockSpec((1, *shape), lambda b, i: (b, 0, 0), memory_space=pltpu.SMEM)
        for shape in (square, square, row)
    ]
    maps = pltpu.VMEM((heads, cut.rows, cut.padded), jnp.float32)
    by_key = pltpu.VMEM((cut.padded, cut.width), jnp.float32)
    sums = [pltpu.VMEM((*shape, ROWS, LANES), jnp.float32) for shape in (square, square, (heads,))]
    by_token, d_pre, d_post, d_bias = pl.pallas_call(
        functools.partial(_backward_kernel, cut=cut, precision=precision),
        grid=(batch, cut.tiles),
        in_specs=[_SCALARS, _SCALARS, _SCALARS, _image(cut), _tile(cut)],
        out_specs=[_image(cut), *by_image],
        out_shape=[
            jax.ShapeDtypeStruct((batch, cut.padded, 3 * cut.width), packed.dtype),
            *(jax.ShapeDtypeStruct((batch, *x), jnp.float32) for x in (square, square, row)),
        ],
        scratch_shapes=[maps, maps, maps, by_key, by_key, *sums],
        cost_estimate=cost_estimate(gradient.shape, packed.dtype, backward=True),
        compiler_params=_parameters(),
        interpret=interpret,
        name="talking_heads_gradient",
    )(
        *map(_scalars, (pre_weight, post_weight, post_bias)),
        _padded(packed, cut),
        _padded(gradient.reshape(batch, tokens, cut.width), cut),
    )
    parts = jnp.split(by_token[:, :tokens], 3, axis=-1)
    return *(x.reshape(gradient.shape) for x in parts), d_pre, d_post, d_bias[:, 0]


def cost_estimate(shape: tuple[int, ...], dtype: Any, *, backward: bool) -> pl.CostEstimate:
    """What a kernel computes and moves, for XLA's scheduler; `shape` is (batch, tokens, heads, dim)."""
    batch, tokens, heads, dim = shape
    pairs = batch * heads * tokens * tokens
    # Backward: logits, the maps' gradient, those of q, k and v; both mixtures, back through both, their weights.
    products, mixtures = (5, 6) if backward else (2, 2)
    arrays = 4 + 3 if backward else 3 + 1
    one = batch * tokens * heads * dim * jnp.dtype(dtype).itemsize
    weights = (2 * heads + 1) * heads * 4
    scalars = weights + (batch * weights if backward else 0)
    return pl.CostEstimate(
        flops=2 * pairs * (products * dim + mixtures * heads),
        transcendentals=pairs,
        bytes_accessed=arrays * one + scalars,
    )


_SCALARS = pl.BlockSpec(memory_space=pltpu.SMEM)


def _scalars(weight: Any) -> Any:
    return weight.astype(jnp.float32)


def _parameters() -> Any:
    return pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=LIMIT_BYTES
    )


def _image(cut: Tiling) -> pl.BlockSpec:
    """Queries, keys and values of an image, moved once."""
    return pl.BlockSpec((1, cut.padded, 3 * cut.width), lambda b, i: (b, 0, 0))


def _tile(cut: Tiling) -> pl.BlockSpec:
    """What belongs to a tile of queries."""
    return pl.BlockSpec((1, cut.queries, cut.width), lambda b, i: (b, i, 0))


def _padded(x: Any, cut: Tiling) -> Any:
    """Padded to the tiles' tokens."""
    return jnp.pad(x, ((0, 0), (0, cut.padded - cut.tokens), (0, 0)))


def _softmaxes(weight: Any, logits: list[Any], cut: Tiling) -> list[Any]:
    """The softmax of every mixture of logits, (rows, keys) each."""
    visible = jax.lax.broadcasted_iota(jnp.int32, (ROWS, cut.padded), 1) < cut.tokens
    result = []
    for to in range(cut.heads):
        mixed = jnp.where(visible, mixture(weight, logits, to), HIDDEN)
        powers = jnp.exp(mixed - mixed.max(axis=1, keepdims=True))
        result.append(powers / powers.sum(axis=1, keepdims=True))
    return result


def _forward_kernel(
    pre: Any, post: Any, post_bias: Any, packed_ref: Any, out_ref: Any, maps: Any, *, cut: Tiling,
    precision: Any,
) -> None:  # fmt: skip
    queries = cut.queries_of(pl.program_id(1))
    for head in range(cut.heads):
        q, k = packed_ref[0, queries, cut.of_head(head)], packed_ref[0, :, cut.of_head(head, 1)]
        maps[head, : cut.queries] = dot(q, k, (1, 1), precision)

    def mix_rows(group: Any, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)
        softmaxes = _softmaxes(pre, [maps[head, rows] for head in range(cut.heads)], cut)
        for to in range(cut.heads):
            maps[to, rows] = mixture(post, softmaxes, to) + post_bias[to]
        return carry

    jax.lax.fori_loop(0, cut.rows // ROWS, mix_rows, None)
    for head in range(cut.heads):
        weights = _hide_keys(maps[head, : cut.queries], cut).astype(packed_ref.dtype)
        out = dot(weights, packed_ref[0, :, cut.of_head(head, 2)], (1, 0), precision)
        out_ref[0, :, cut.of_head(head)] = out.astype(out_ref.dtype)


def _hide_keys(maps: Any, cut: Tiling) -> Any:
    """With 0 for padded keys."""
    if cut.padded == cut.tokens:
        return maps
    visible = jax.lax.broadcasted_iota(jnp.int32, maps.shape, 1) < cut.tokens
    return jnp.where(visible, maps, 0.0)


def _backward_kernel(
    pre: Any, post: Any, post_bias: Any, packed_ref: Any, gradient_ref: Any,
    d_packed_ref: Any, dpre_ref: Any, dpost_ref: Any, dbias_ref: Any,
    logits: Any, mixed: Any, d_maps: Any, dk: Any, dv: Any, d_pre: Any, d_post: Any, d_bias: Any, *,
    cut: Tiling, precision: Any,
) -> None:  # fmt: skip
    tile, heads = pl.program_id(1), range(cut.heads)
    queries = cut.queries_of(tile)

    def parts(head: int) -> tuple[Any, ...]:
        q = packed_ref[0, queries, cut.of_head(head)]
        k, v = (packed_ref[0, :, cut.of_head(head, part)] for part in (1, 2))
        return q, k, v, gradient_ref[0, :, cut.of_head(head)]

    @pl.when(tile == 0)
    def _start() -> None:
        for total in (dk, dv, d_pre, d_post, d_bias):
            total[...] = jnp.zeros_like(total)

    for head in heads:
        q, k, v, gradient = parts(head)
        logits[head, : cut.queries] = dot(q, k, (1, 1), precision)
        d_maps[head, : cut.queries] = dot(gradient, v, (1, 1), precision)

    def mix_rows(group: Any, carry: None) -> None:
        rows = pl.ds(pl.multiple_of(group * ROWS, ROWS), ROWS)
        real = _real(tile, group, cut)
        plain = [jnp.where(real, logits[head, rows], 0.0) for head in heads]
        d_mixed = [jnp.where(real, d_maps[head, rows], 0.0) for head in heads]
        softmaxes = _softmaxes(pre, plain, cut)
        d_logits = []
        for head in heads:
            mixed[head, rows] = jnp.where(
                real, mixture(post, softmaxes, head) + post_bias[head], 0.0
            )
            d_softmax = mixture(post, d_mixed, head, transposed=True)
            both = softmaxes[head] * d_softmax
            d_logits.append(both - softmaxes[head] * both.sum(axis=1, keepdims=True))
            d_bias[head] += _folded(d_mixed[head])
            for to in heads:
                d_post[head, to] += _folded(softmaxes[head] * d_mixed[to])
        for head in heads:
            d_maps[head, rows] = mixture(pre, d_logits, head, transposed=True)
            for to in heads:
                d_pre[head, to] += _folded(plain[head] * d_logits[to])
        return carry

    jax.lax.fori_loop(0, cut.rows // ROWS, mix_rows, None)
    for head in heads:
        q, k, _, gradient = parts(head)
        channels = cut.of_head(head)
        d_logits = d_maps[head, : cut.queries].astype(q.dtype)
        weights = mixed[head, : cut.queries].astype(gradient.dtype)
        dq = dot(d_logits, k, (1, 0), precision)
        d_packed_ref[0, queries, channels] = dq.astype(d_packed_ref.dtype)
        dk[:, channels] += dot(d_logits, q, (0, 0), precision)
        dv[:, channels] += dot(weights, gradient, (0, 0), precision)

    @pl.when(tile == cut.tiles - 1)
    def _finish() -> None:
        for part, total in ((1, dk), (2, dv)):
            channels = slice(part * cut.width, (part + 1) * cut.width)
            d_packed_ref[0, :, channels] = total[...].astype(d_packed_ref.dtype)
        for head in heads:
            dbias_ref[0, 0, head] = jnp.sum(d_bias[head])
            for to in heads:
                dpre_ref[0, head, to] = jnp.sum(d_pre[head, to])
                dpost_ref[0, head, to] = jnp.sum(d_post[head, to])


def _real(tile: Any, group: Any, cut: Tiling) -> Any:
    """Which pairs of a group of rows are of no padded query or key, (rows, keys)."""
    shape = (ROWS, cut.padded)
    row = group * ROWS + jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    key = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    inside = tile * cut.queries + row < cut.tokens
    return inside & (row < cut.queries) & (key < cut.tokens)


def _folded(maps: Any) -> Any:
    """(rows, keys) summed to one register; the rest of the sum is done once, at the end."""
    keys = maps.shape[1]
    whole = keys // LANES * LANES
    total = jnp.zeros((ROWS, LANES), maps.dtype)
    for start in range(0, whole, LANES):
        total += maps[:, start : start + LANES]
    if whole < keys:
        total += jnp.pad(maps[:, whole:], ((0, 0), (0, LANES - (keys - whole))))
    return total
