"""The gradient of talking-heads attention as two kernels for Hopper GPUs, in Pallas' Mosaic GPU backend.

With P the softmaxes, W the maps after both mixtures and d of a number its gradient, for a head f after the second
mixture, g between them and h before the first:

    dW_f = dO_f V_f^T,  dP_g = sum_f post[g, f] dW_f,  dX_g = P_g (dP_g - delta_g),  delta_g = rowsum(P_g dP_g),
    dS_h = sum_g pre[h, g] dX_g,  dQ_h = dS_h K_h,  dK_h = dS_h^T Q_h,  dV_f = W_f^T dO_f.

By query, a program has tiles of 64 queries and reads all keys three times: for delta and the gradient of `post`,
for that of `pre`, and for dQ. By key, it has 64 keys, and all is transposed: dV, then dK. Both compute S and dW
again, 8 columns at a time of all heads; two such steps are as deep as a product's operand. A warpgroup has the
outputs of up to four heads, as in the forward pass. A gradient of a mixture is a sum over a whole map: each thread
keeps one number for each pair of heads until the end.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cait_jax.kernels import HIDDEN
from cait_jax.kernels.gpu_gradients import ByKey, ByQuery
from cait_jax.kernels.gpu_plan import ALIGNED, KEYS, ROWS, WORKERS, BackwardPlan, backward_plan
from cait_jax.kernels.gpu_tiles import (
    SWIZZLED,
    Program,
    Ring,
    divide,
    launch,
    packed,
    split,
    weight_rows,
)

_QUERIES, _KEYS, _VALUES, _GRADIENT = range(4)


def backward(
    q: Any, k: Any, v: Any, pre_weight: Any, post_weight: Any, post_bias: Any, sums: Any, gradient: Any, *,
    interpret: bool = False,
) -> tuple[Any, ...]:  # fmt: skip
    """Gradients of all arguments of `gpu.forward`, whose `sums` are given; see `gpu_plan.backward_refusal`."""
    batch, tokens = q.shape[:2]
    cut = backward_plan(q)
    pre, post, bias = (w.astype(jnp.float32) for w in (pre_weight, post_weight, post_bias))
    # Softmaxes are powers of 2, and so a dX times log(2) times the weights of the first mixture is a dS.
    natural = math.log(2)
    weights = weight_rows(cut, pre.T / natural, post * natural, post, bias[None])
    rows = gradient.reshape(batch * tokens, cut.width)
    given = weights, packed(q, k, v, cut), split(rows, cut.parts), _padded(sums, cut)
    margin = ALIGNED if interpret else 0  # its copies stay in bounds

    def out(like: Any) -> Any:
        size = margin + cut.rows if interpret else tokens
        return jax.ShapeDtypeStruct((batch, size, cut.width), like.dtype)

    def cropped(x: Any) -> Any:
        return x[:, margin : margin + tokens].reshape(q.shape)

    def float32(*shape: int) -> Any:
        return jax.ShapeDtypeStruct((batch, *shape), jnp.float32)

    outs = [
        out(q),
        float32(cut.statistics, cut.rows),
        float32(cut.programs, WORKERS, ROWS),
    ]
    run = _kernel(_by_query, "by_query", cut, outs, margin, weights.shape, batch, interpret)
    d_q, deltas, totals = run(*given)
    run = _kernel(_by_key, "by_key", cut, [out(k), out(v)], margin, weights.shape, batch, interpret)
    d_k, d_v = run(*given, deltas)
    d_post, d_pre = _of_pairs(totals.sum(axis=(0, 1)), cut)
    ends = (x.astype(jnp.float32).sum(axis=1) for x in (gradient, v))
    d_bias = jnp.einsum("bfc,bfc->f", *ends, precision="highest")
    return (
        *map(cropped, (d_q, d_k, d_v)),
        (d_pre.T / natural).astype(pre_weight.dtype),
        d_post.astype(post_weight.dtype),
        d_bias.astype(post_bias.dtype),
    )


def _padded(sums: Any, cut: BackwardPlan) -> Any:
    """So high for rows that are no queries of the image that their softmaxes are 0."""
    batch, heads, rows = sums.shape
    missing = max(0, cut.rows - rows)
    sums = jnp.pad(sums, ((0, 0), (0, cut.statistics - heads), (0, missing)))[:, :, : cut.rows]
    offset = jnp.arange(batch) * cut.tokens % ALIGNED
    token = jnp.arange(cut.rows)[None] - offset[:, None]
    real = (token >= 0) & (token < cut.tokens)
    return jnp.where(real[:, None], sums, -HIDDEN)


def _of_pairs(totals: Any, cut: BackwardPlan) -> Any:
    """The two kinds of totals by softmax and the other head, (2, heads, heads), from the warpgroups' (2, rows)."""
    shape = WORKERS, 2, cut.group, cut.heads
    found = totals[:, : math.prod(shape[1:])].reshape(shape)
    if not cut.by_head:
        return found.sum(axis=0)
    return jnp.concatenate([found[0], found[1][:, 2 * cut.group - cut.heads :]], axis=1)


def _kernel(
    body: Any, name: str, cut: BackwardPlan, outs: list[Any], margin: int, weights: tuple[int, ...], batch: int,
    interpret: bool,
) -> Any:  # fmt: skip
    by_query = body is _by_query
    swizzled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=SWIZZLED)
    begun = 1 + cut.tiles * (2 * cut.parts + by_query)
    scratch: dict[str, Any] = {
        "weights": plgpu.SMEM(weights, jnp.float32),
        "zeros": plgpu.SMEM((WORKERS, 128), jnp.int32),
        "held": swizzled((2 * cut.tiles, cut.parts, ROWS, cut.width)),
        "tiles": swizzled((cut.slots, cut.parts, KEYS, cut.width)),
        "outputs": plgpu.SMEM((WORKERS, ROWS, cut.staged * cut.dim), outs[0].dtype),
        "begun": plgpu.Barrier(num_arrivals=begun),
        "full": plgpu.Barrier(num_arrivals=cut.parts + (not by_query), num_barriers=cut.slots),
        "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=cut.slots),
    }
    if by_query:
        scratch["sums"] = plgpu.SMEM((cut.tiles, cut.statistics, ROWS), jnp.float32)
        scratch["deltas"] = plgpu.SMEM((cut.tiles, cut.statistics, ROWS), jnp.float32)
        scratch["by_pair"] = plgpu.SMEM((WORKERS, ROWS, ROWS), jnp.float32)
        scratch["totals"] = plgpu.SMEM((WORKERS, ROWS), jnp.float32)
        scratch["measured"] = plgpu.Barrier(num_arrivals=WORKERS)
    else:
        scratch["statistics"] = plgpu.SMEM((cut.slots, cut.statistics, KEYS), jnp.float32)
    body = functools.partial(body, cut=cut, margin=margin)
    name = f"talking_heads_gradient_{name}"
    return launch(body, name, outs, scratch, batch, cut, interpret=interpret)


def _sources(program: Program, cut: BackwardPlan, packed_ref: Any, gradient_ref: Any) -> Any:
    def source(which: int, start: Any, size: int, part: int) -> Any:
        ref, column = (gradient_ref, 0) if which == _GRADIENT else (packed_ref, which)
        return ref.at[part, program.rows(start, size), pl.ds(column * cut.width, cut.width)]

    return source


def _load(
    program: Program, cut: BackwardPlan, ring: Ring, source: Any, holds: tuple[int, int],
    streams: tuple[int, int], sweeps: int, begun: Any, weights: tuple[Any, Any], held: Any,
    by_row: tuple[Any, Any] | None, by_column: tuple[Any, Any, Any] | None,
) -> None:  # fmt: skip
    """What the third warpgroup does: tiles that are held, then all that are streamed, once a sweep."""
    plgpu.copy_gmem_to_smem(*weights, begun)
    for tile in range(cut.tiles):
        start = program.row + tile * ROWS
        if by_row is not None:
            ref, target = by_row
            columns = pl.ds(start, ROWS)
            plgpu.copy_gmem_to_smem(ref.at[program.image, :, columns], target.at[tile], begun)
        for i, which in enumerate(holds):
            for part in range(cut.parts):
                target = held.at[i * cut.tiles + tile, part]
                plgpu.copy_gmem_to_smem(source(which, start, ROWS, part), target, begun)

    @pl.loop(0, sweeps * cut.blocks)
    def _(pair: Any) -> None:
        start = lax.rem(pair, jnp.int32(cut.blocks)) * KEYS
        for i, which in enumerate(streams):
            others = []
            if by_column is not None:
                rows = by_column[i].at[program.image, :, pl.ds(start, KEYS)]
                others.append((rows, by_column[2]))
            ring.put(2 * pair + i, functools.partial(source, which, start, KEYS), *others)

    ring.drain(2 * sweeps * cut.blocks)


def _by_query(
    weights_ref: Any, packed_ref: Any, gradient_ref: Any, sums_ref: Any, d_q_ref: Any, deltas_ref: Any,
    totals_ref: Any, *, cut: BackwardPlan, margin: int, weights: Any, held: Any, tiles: Any, begun: Any,
    full: Any, free: Any, sums: Any, **scratch: Any,
) -> None:  # fmt: skip
    program, ring = Program(cut), Ring(cut, tiles, full, free)

    def load() -> None:
        source = _sources(program, cut, packed_ref, gradient_ref)
        _load(
            program, cut, ring, source, (_QUERIES, _GRADIENT), (_KEYS, _VALUES), 3, begun, (weights_ref, weights),
            held, (sums_ref, sums), None,
        )  # fmt: skip

    def compute() -> None:
        worker = ByQuery(cut, program, ring, weights=weights, held=held, sums=sums, **scratch)
        plgpu.barrier_wait(begun)
        worker.measure()
        worker.first_mixture()
        start = program.row + worker.tile * ROWS
        heads = pl.ds(worker.head, cut.group)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            worker.deltas.at[worker.tile, heads],
            deltas_ref.at[program.image, heads, pl.ds(start, ROWS)],
        )
        found = worker.queries()
        first = start - program.offset + margin
        worker.write(found, d_q_ref.at[program.image], first, worker.head)
        worker.add_up()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(
            worker.totals.at[program.warpgroup],
            totals_ref.at[program.image, program.index, program.warpgroup],
        )
        plgpu.wait_smem_to_gmem(0)

    divide(program, load, compute)


def _by_key(
    weights_ref: Any, packed_ref: Any, gradient_ref: Any, sums_ref: Any, deltas_ref: Any, d_k_ref: Any,
    d_v_ref: Any, *, cut: BackwardPlan, margin: int, weights: Any, held: Any, tiles: Any, begun: Any, full: Any,
    free: Any, statistics: Any, **scratch: Any,
) -> None:  # fmt: skip
    program, ring = Program(cut), Ring(cut, tiles, full, free)

    def load() -> None:
        source = _sources(program, cut, packed_ref, gradient_ref)
        _load(
            program, cut, ring, source, (_KEYS, _VALUES), (_QUERIES, _GRADIENT), 2, begun, (weights_ref, weights),
            held, None, (sums_ref, deltas_ref, statistics),
        )  # fmt: skip

    def compute() -> None:
        worker = ByKey(
            cut, program, ring, weights=weights, held=held, statistics=statistics, **scratch
        )
        plgpu.barrier_wait(begun)
        start = program.row + worker.tile * ROWS - program.offset + margin
        worker.write(worker.values(), d_v_ref.at[program.image], start, worker.head)
        worker.write(worker.keys(), d_k_ref.at[program.image], start, worker.head, begun=True)
        plgpu.wait_smem_to_gmem(0)

    divide(program, load, compute)
