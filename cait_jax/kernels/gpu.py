"""Talking-heads attention's forward pass as a kernel for Hopper GPUs, in Pallas' Mosaic GPU backend.

A program has 64 or 128 queries of an image. One warpgroup loads tiles of 16 keys, or values, of all heads into a
ring in shared memory; two others compute. Softmaxes must be whole before they can be mixed: a first pass over the
keys finds each row's maximum and sum, a second recomputes the maps and uses them. Logits, maps and sums stay in
registers, whose number decides the rest: up to 4 heads each warpgroup has 64 queries of its own; with more, both
have the same, and each its half of the sums and of the outputs, for which both compute all softmaxes.
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
from cait_jax.kernels.gpu_plan import ALIGNED, KEYS, ROWS, WORKERS, Plan, plan
from cait_jax.kernels.gpu_tiles import (
    SWIZZLED,
    Program,
    Ring,
    Worker,
    divide,
    hidden_where_not,
    launch,
    packed,
    weight_rows,
)

LANES = (
    8  # keys between which a thread keeps apart its maxima and sums until the end of the first pass
)


def forward(
    q: Any, k: Any, v: Any, pre_weight: Any, post_weight: Any, post_bias: Any, *, keep_sums: bool = False,
    interpret: bool = False,
) -> tuple[Any, Any]:  # fmt: skip
    """`talking_heads_attention` without `pre_bias`, on which no output depends; see `gpu_plan.refusal`.

    A product in float32 is six of three bfloat16 parts each, as accurate. `interpret` needs jax 0.11 and four
    threads of XLA (cores, or `NPROC=4` in the environment): with fewer it waits for ever.

    Returns the output, and with `keep_sums` log2 of the softmaxes' sums, else None: float32 (batch, heads, rows),
    whose first row is that of the image's first tile.
    """
    batch, tokens, heads, dim = q.shape
    cut = plan(q)
    pre, post, bias = (w.astype(jnp.float32) for w in (pre_weight, post_weight, post_bias))
    weights = weight_rows(cut, pre.T * math.log2(math.e), post.T, bias[None])
    swizzled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=SWIZZLED)
    scratch: dict[str, Any] = {
        "weights": plgpu.SMEM(weights.shape, jnp.float32),
        "zeros": plgpu.SMEM((WORKERS, 128), jnp.int32),
        "held": swizzled((cut.tiles, cut.parts, ROWS, cut.width)),
        "tiles": swizzled((cut.slots, cut.parts, KEYS, cut.width)),
        "sums": plgpu.SMEM((cut.tiles, heads, ROWS), jnp.float32),
        "outputs": plgpu.SMEM((WORKERS, ROWS, cut.staged * dim), v.dtype),
        "begun": plgpu.Barrier(num_arrivals=1 + cut.tiles * cut.parts),
        "measured": plgpu.Barrier(num_arrivals=WORKERS),
        "full": plgpu.Barrier(num_arrivals=cut.parts, num_barriers=cut.slots),
        "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=cut.slots),
    }
    margin = ALIGNED if interpret else 0  # its copies stay in bounds
    rows = margin + cut.rows if interpret else tokens
    outs = [jax.ShapeDtypeStruct((batch, rows, cut.width), v.dtype)]
    if keep_sums:
        outs.append(jax.ShapeDtypeStruct((batch, heads, cut.rows), jnp.float32))
    body = functools.partial(_kernel, cut=cut, margin=margin, keep_sums=keep_sums)
    run = launch(body, "talking_heads", outs, scratch, batch, cut, interpret=interpret)
    out, *sums = run(weights, packed(q, k, v, cut))
    return out[:, margin : margin + tokens].reshape(q.shape), sums[0] if sums else None


def _kernel(
    weights_ref: Any, packed_ref: Any, out_ref: Any, *sums_refs: Any, cut: Plan, margin: int, keep_sums: bool,
    weights: Any, held: Any, tiles: Any, begun: Any, full: Any, free: Any, **scratch: Any,
) -> None:  # fmt: skip
    program, ring = Program(cut), Ring(cut, tiles, full, free)

    def source(which: int, start: Any, size: int, part: int) -> Any:
        columns = pl.ds(which * cut.width, cut.width)
        return packed_ref.at[part, program.rows(start, size), columns]

    def load() -> None:
        plgpu.copy_gmem_to_smem(weights_ref, weights, begun)
        for tile in range(cut.tiles):
            for part in range(cut.parts):
                queries = source(0, program.row + tile * ROWS, ROWS, part)
                plgpu.copy_gmem_to_smem(queries, held.at[tile, part], begun)

        def put(turn: Any, which: int, block: Any) -> None:
            ring.put(turn, functools.partial(source, which, block * KEYS, KEYS))

        @pl.loop(0, cut.blocks)
        def _(block: Any) -> None:
            put(block, 1, block)

        @pl.loop(0, cut.sweeps * cut.blocks)
        def _(turn: Any) -> None:
            block = lax.rem(turn, jnp.int32(cut.blocks))
            put(cut.blocks + 2 * turn, 1, block)
            put(cut.blocks + 2 * turn + 1, 2, block)

        ring.drain(cut.blocks * (1 + 2 * cut.sweeps))

    def compute() -> None:
        worker = _Worker(cut, program, ring, weights=weights, held=held, **scratch)
        plgpu.barrier_wait(begun)
        head = worker.measure()
        start = program.row + worker.tile * ROWS
        if keep_sums:
            plgpu.commit_smem()
            heads = pl.ds(head, cut.group)
            plgpu.copy_smem_to_gmem(
                worker.sums.at[worker.tile, heads],
                sums_refs[0].at[program.image, heads, pl.ds(start, ROWS)],
            )
        for sweep in range(cut.sweeps):
            head, found = worker.use(sweep)
            first = start - program.offset + margin
            worker.write(found, out_ref.at[program.image], first, head, sweep > 0)
        plgpu.wait_smem_to_gmem(0)

    divide(program, load, compute)


class _Worker(Worker):
    def __init__(self, *given: Any, sums: Any, measured: Any, **scratch: Any) -> None:
        super().__init__(*given, **scratch)
        self.sums, self.measured = sums, measured

    def measure(self) -> Any:
        """The first pass: log2 of the softmaxes' sums, of this warpgroup's heads, into shared memory.

        Returns the first of these heads.
        """
        cut = self.cut
        head = jnp.minimum(self.half * cut.group, cut.heads - cut.group)

        def block(j: Any, carry: Any) -> Any:
            largest, total = map(list, carry)
            for logits, seen in self._steps(j, j):
                hidden = hidden_where_not(seen)
                for i in range(cut.group):
                    x = self.mixture(logits, head + i, hidden)
                    columns = [x[:, c : c + LANES] for c in range(0, cut.step, LANES)]
                    larger = functools.reduce(jnp.maximum, columns, largest[i])
                    total[i] = total[i] * jnp.exp2(largest[i] - larger)
                    for column in columns:
                        total[i] = total[i] + jnp.exp2(column - larger)
                    largest[i] = larger
            return tuple(largest), tuple(total)

        begin = (self.lanes(HIDDEN),) * cut.group, (self.lanes(0.0),) * cut.group
        for i, (most, total) in enumerate(
            zip(*lax.fori_loop(0, cut.blocks, block, begin), strict=True)
        ):
            top = most.max(axis=1)
            scale = jnp.exp2(most - lax.broadcast_in_dim(top, most.shape, [0]))
            self.sums[self.tile, head + i] = top + jnp.log2((total * scale).sum(axis=1))
        plgpu.barrier_arrive(self.measured)
        plgpu.barrier_wait(self.measured)
        return head

    def use(self, sweep: int) -> tuple[Any, list[Any]]:
        """A sweep of the second pass: its first head, and outputs (queries, dim) of this and the next ones."""
        cut = self.cut
        head = jnp.minimum((self.half * cut.sweeps + sweep) * cut.outputs, cut.heads - cut.outputs)

        def run(*sums: Any) -> list[Any]:
            @pl.loop(0, cut.blocks)
            def _(j: Any) -> None:
                turn = (1 + 2 * sweep) * cut.blocks + 2 * j
                maps: list[list[Any]] = [[] for _ in sums]
                for logits, seen in self._steps(turn, j):
                    for each, found in zip(maps, self._maps(logits, seen, head), strict=True):
                        each.append(found)
                slot = self.ring.take(turn + 1)
                parts = [[self.narrow(x) for x in each] for each in maps]
                for i, total in enumerate(sums):
                    self.accumulate(total, parts[i], slot, head + i)
                plgpu.wgmma_wait(0)
                self.ring.give(slot)

            return [total[...] for total in sums]

        sums = [plgpu.WGMMAAccumulatorRef((ROWS, cut.dim), jnp.float32)] * cut.outputs
        return head, pl.run_scoped(run, *sums)

    def _steps(self, turn: Any, j: Any) -> Any:
        """Of a tile of keys: logits by head (queries, keys), and which are of this image; None if all are."""
        slot = self.ring.take(turn)
        for start in range(0, KEYS, self.cut.step):
            (logits,) = self.products(start, slot)
            if start + self.cut.step == KEYS:
                self.ring.give(slot)
            yield logits, self.seen(j, start)

    def _maps(self, logits: list[Any], seen: Any, first: Any) -> list[Any]:
        """Of this sweep's heads, after both mixtures; 0 for tokens of other images."""
        cut, heads = self.cut, self.cut.heads
        hidden = hidden_where_not(seen)
        found = [self.weights[2 * heads, first + i] for i in range(cut.outputs)]
        if seen is not None:
            found = [jnp.where(seen, bias, 0.0) for bias in found]
        for head in range(heads):
            mixed = self.mixture(logits, head, hidden)
            softmax = jnp.exp2(mixed - self.by_row(self.sums, head))
            found = [
                x + softmax * self.weights[heads + first + i, head] for i, x in enumerate(found)
            ]
        return found
