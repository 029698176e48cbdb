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

REGISTERS = {"worker": 240, "loader": 24}  # of a thread; 504 of the 512 that three warpgroups have
LANES = (
    8  # keys between which a thread keeps apart its maxima and sums until the end of the first pass
)
_SWIZZLED = (plgpu.TilingTransform((ALIGNED, 16)), plgpu.SwizzleTransform(32))
_WGMMA = plgpu.Layout.WGMMA


def forward(
    q: Any,
    k: Any,
    v: Any,
    pre_weight: Any,
    post_weight: Any,
    post_bias: Any,
    *,
    interpret: bool = False,
) -> Any:
    """`talking_heads_attention` without `pre_bias`, on which no output depends; see `gpu_plan.refusal`.

    A product in float32 is six of three bfloat16 parts each, as accurate. `interpret` needs jax 0.11 and four
    threads of XLA (cores, or `NPROC=4` in the environment): with fewer it waits for ever.
    """
    batch, tokens, heads, dim = q.shape
    cut = plan(q)
    # In the network q, k and v are parts of one array, which XLA finds again here.
    packed = jnp.concatenate([x.reshape(batch, tokens, cut.width) for x in (q, k, v)], axis=-1)
    packed = packed.reshape(batch * tokens, 3 * cut.width)
    pre, post, bias = (w.astype(jnp.float32) for w in (pre_weight, post_weight, post_bias))
    weights = jnp.concatenate([pre.T * math.log2(math.e), post.T, bias[None]])
    weights = jnp.pad(weights, ((0, -len(weights) % 8), (0, -heads % 4)))  # to whole copies
    swizzled = functools.partial(plgpu.SMEM, dtype=jnp.bfloat16, transforms=_SWIZZLED)
    scratch: dict[str, Any] = {
        "weights": plgpu.SMEM(weights.shape, jnp.float32),
        "zeros": plgpu.SMEM((WORKERS, 128), jnp.int32),
        "queries": swizzled((cut.tiles, cut.parts, ROWS, cut.width)),
        "ring": swizzled((cut.slots, cut.parts, KEYS, cut.width)),
        "sums": plgpu.SMEM((cut.tiles, heads, ROWS), jnp.float32),
        "outputs": plgpu.SMEM((WORKERS, ROWS, cut.staged * dim), v.dtype),
        "begun": plgpu.Barrier(num_arrivals=1 + cut.tiles * cut.parts),
        "measured": plgpu.Barrier(num_arrivals=WORKERS),
        "full": plgpu.Barrier(num_arrivals=cut.parts, num_barriers=cut.slots),
        "free": plgpu.Barrier(num_arrivals=WORKERS, num_barriers=cut.slots),
    }
    if (
        interpret
    ):  # whose wgmma takes no registers and nothing transposed, and whose copies stay in bounds
        scratch["left"] = plgpu.SMEM((WORKERS, ROWS, KEYS), jnp.bfloat16)
        scratch["right"] = plgpu.SMEM((WORKERS, dim, cut.step), jnp.bfloat16)
    margin = ALIGNED if interpret else 0
    rows = margin + cut.programs * cut.tiles * ROWS if interpret else tokens
    out = plgpu.kernel(
        functools.partial(_kernel, cut=cut, margin=margin),
        out_type=jax.ShapeDtypeStruct((batch, rows, cut.width), v.dtype),
        scratch_types=scratch,
        grid=(cut.programs, batch),
        grid_names=("tile", "image"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=_interpreter() if interpret else None,
        kernel_name="talking_heads",
    )(weights, jnp.stack(_split(packed, cut.parts)))
    return out[:, margin : margin + tokens].reshape(q.shape)


def _interpreter() -> Any:
    backend: Any = plgpu  # has them since jax 0.11
    return backend.InterpretGPUParams(
        out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
    )


def _split(x: Any, parts: int) -> list[Any]:
    """bfloat16 arrays whose sum is `x`, to 8 bits a part."""
    found = []
    for _ in range(parts - 1):
        found.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return [part.astype(jnp.bfloat16) for part in (*found, x)]


def _kernel(
    weights_ref: Any, packed_ref: Any, out_ref: Any, *, cut: Plan, margin: int, weights: Any, queries: Any,
    ring: Any, begun: Any, full: Any, free: Any, **scratch: Any,
) -> None:  # fmt: skip
    warpgroup, image, program = map(lax.axis_index, ("warpgroup", "image", "tile"))
    offset = lax.rem(image * cut.tokens, jnp.int32(ALIGNED)) if cut.shift else jnp.int32(0)
    first = image * cut.tokens - offset
    row = program * (cut.tiles * ROWS)

    def rows(start: Any, size: int) -> Any:
        return pl.ds(pl.multiple_of(first + start, ALIGNED), size)

    @pl.when(warpgroup == WORKERS)
    def _load() -> None:
        plgpu.set_max_registers(REGISTERS["loader"], action="decrease")
        plgpu.copy_gmem_to_smem(weights_ref, weights, begun)
        for tile in range(cut.tiles):
            for part in range(cut.parts):
                source = packed_ref.at[part, rows(row + tile * ROWS, ROWS), pl.ds(0, cut.width)]
                plgpu.copy_gmem_to_smem(source, queries.at[tile, part], begun)

        def put(turn: Any, which: int, block: Any) -> None:
            slot = lax.rem(turn, jnp.int32(cut.slots))

            @pl.when(turn >= cut.slots)
            def _() -> None:
                plgpu.barrier_wait(free.at[slot])

            columns = pl.ds(which * cut.width, cut.width)
            for part in range(cut.parts):
                source = packed_ref.at[part, rows(block * KEYS, KEYS), columns]
                plgpu.copy_gmem_to_smem(source, ring.at[slot, part], full.at[slot])

        @pl.loop(0, cut.blocks)
        def _(block: Any) -> None:
            put(block, 1, block)

        @pl.loop(0, cut.sweeps * cut.blocks)
        def _(turn: Any) -> None:
            block = lax.rem(turn, jnp.int32(cut.blocks))
            put(cut.blocks + 2 * turn, 1, block)
            put(cut.blocks + 2 * turn + 1, 2, block)

        turns = cut.blocks * (1 + 2 * cut.sweeps)
        for turn in range(max(turns - cut.slots, 0), turns):
            plgpu.barrier_wait(free.at[turn % cut.slots])

    @pl.when(warpgroup < WORKERS)
    def _compute() -> None:
        plgpu.set_max_registers(REGISTERS["worker"], action="increase")
        worker = _Worker(
            cut, warpgroup, offset, weights=weights, queries=queries, ring=ring, full=full, free=free, **scratch
        )  # fmt: skip
        plgpu.barrier_wait(begun)
        worker.measure()
        start = row + worker.tile * ROWS - offset + margin
        for sweep in range(cut.sweeps):
            head, found = worker.use(sweep)
            for i in range(0, cut.outputs, cut.staged):
                if sweep or i:
                    plgpu.wait_smem_to_gmem(0)
                for j in range(cut.staged):
                    columns = pl.ds(j * cut.dim, cut.dim)
                    worker.put_output(columns, found[i + j].astype(out_ref.dtype))
                plgpu.commit_smem()
                columns = pl.ds((head + i) * cut.dim, cut.staged * cut.dim)
                plgpu.copy_smem_to_gmem(
                    worker.outputs.at[warpgroup], out_ref.at[image, pl.ds(start, ROWS), columns]
                )
        plgpu.wait_smem_to_gmem(0)


class _Worker:
    """A warpgroup that computes; `left` and `right` are there in the interpreter."""

    def __init__(self, cut: Plan, index: Any, offset: Any, *, weights: Any, zeros: Any, queries: Any, ring: Any,
                 sums: Any, outputs: Any, measured: Any, full: Any, free: Any, left: Any = None,
                 right: Any = None) -> None:  # fmt: skip
        self.cut, self.index, self.offset = cut, index, offset
        self.weights, self.zeros, self.queries, self.ring = weights, zeros, queries, ring
        self.sums, self.outputs, self.measured = sums, outputs, measured
        self.full, self.free, self.left, self.right = full, free, left, right
        none = jnp.int32(0)
        self.tile, self.half = (none, index) if cut.by_head else (index, none)
        self.products = [
            (i, j) for i in range(cut.parts) for j in range(cut.parts) if i + j < cut.parts
        ]
        zeros[index] = jnp.zeros((128,), jnp.int32)
        plgpu.commit_smem()

    def measure(self) -> None:
        """The first pass: log2 of each softmax's sum, of this warpgroup's heads, into shared memory."""
        cut = self.cut
        head = jnp.minimum(self.half * cut.group, cut.heads - cut.group)

        def block(j: Any, carry: Any) -> Any:
            largest, total = map(list, carry)
            for logits, seen in self._steps(j, j):
                hidden = None if seen is None else jnp.where(seen, 0.0, HIDDEN)
                for i in range(cut.group):
                    x = self._mixed(logits, head + i, hidden)
                    columns = [x[:, c : c + LANES] for c in range(0, cut.step, LANES)]
                    larger = functools.reduce(jnp.maximum, columns, largest[i])
                    total[i] = total[i] * jnp.exp2(largest[i] - larger)
                    for column in columns:
                        total[i] = total[i] + jnp.exp2(column - larger)
                    largest[i] = larger
            return tuple(largest), tuple(total)

        begin = (self._lanes(HIDDEN),) * cut.group, (self._lanes(0.0),) * cut.group
        for i, (most, total) in enumerate(
            zip(*lax.fori_loop(0, cut.blocks, block, begin), strict=True)
        ):
            top = most.max(axis=1)
            scale = jnp.exp2(most - lax.broadcast_in_dim(top, most.shape, [0]))
            self.sums[self.tile, head + i] = top + jnp.log2((total * scale).sum(axis=1))
        plgpu.barrier_arrive(self.measured)
        plgpu.barrier_wait(self.measured)

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
                slot = self._wait(turn + 1)
                parts = [self._as_operands(each) for each in maps]
                for i, total in enumerate(sums):
                    columns = pl.ds(pl.multiple_of((head + i) * cut.dim, 16), cut.dim)
                    for a, b in self.products:
                        left = parts[i][a]
                        if self.left is not None:
                            self.left[self.index] = left
                            left = self.left.at[self.index]
                        plgpu.wgmma(total, left, self.ring.at[slot, b, :, columns])
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(self.free.at[slot])

            return [total[...] for total in sums]

        sums = [plgpu.WGMMAAccumulatorRef((ROWS, cut.dim), jnp.float32)] * cut.outputs
        return head, pl.run_scoped(run, *sums)

    def put_output(self, columns: Any, values: Any) -> None:
        """Of a head, into shared memory; banks conflict, which jax 0.12 wants to be told."""
        backend: Any = plgpu
        if hasattr(backend, "store") and self.left is None:
            backend.store(self.outputs.at[self.index, :, columns], values, optimized=False)
        else:
            self.outputs[self.index, :, columns] = values

    def _wait(self, turn: Any) -> Any:
        slot = lax.rem(turn, jnp.int32(self.cut.slots))
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def _steps(self, turn: Any, j: Any) -> Any:
        """Of a tile of keys: logits by head (queries, keys), and which are of this image; None if all are."""
        cut, slot = self.cut, self._wait(turn)
        for start in range(0, KEYS, cut.step):
            logits = self._logits(slot, start)
            if start + cut.step == KEYS:
                plgpu.barrier_arrive(self.free.at[slot])
            seen = None
            if cut.shift or cut.tokens % KEYS:
                shape = (ROWS, cut.step)
                key = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=_WGMMA)
                key = key + (j * KEYS + start - self.offset)
                seen = (key >= 0) & (key < cut.tokens)
            yield logits, seen

    def _logits(self, slot: Any, start: int) -> list[Any]:
        # Read each time, so that the compiler does not keep the addresses of all operands in registers.
        zero = self.zeros[self.index, 0]
        queries = self.queries.at[self.tile + zero]
        slot = zero if self.cut.slots == 1 else slot

        def run(*sums: Any) -> list[Any]:
            for head, total in enumerate(sums):
                columns = pl.ds(head * self.cut.dim, self.cut.dim)
                for a, b in self.products:
                    keys = self.ring.at[slot, b, pl.ds(start, self.cut.step), columns]
                    if self.right is not None:
                        self.right[self.index] = keys[...].T
                        keys = self.right.at[self.index]
                    else:
                        keys = _transposed(keys)
                    plgpu.wgmma(total, queries.at[a, :, columns], keys)
            return [total[...] for total in sums]

        sums = [plgpu.WGMMAAccumulatorRef((ROWS, self.cut.step), jnp.float32)] * self.cut.heads
        found: list[Any] = pl.run_scoped(run, *sums)
        return found

    def _mixed(self, logits: list[Any], to: Any, hidden: Any) -> Any:
        """A head's logits after mixing, times log2(e)."""
        total = logits[0] * self.weights[to, 0]
        if hidden is not None:
            total = total + hidden
        for head in range(1, self.cut.heads):
            total = total + logits[head] * self.weights[to, head]
        return total

    def _maps(self, logits: list[Any], seen: Any, first: Any) -> list[Any]:
        """Of this sweep's heads, after both mixtures; 0 for tokens of other images."""
        cut, heads = self.cut, self.cut.heads
        hidden = None if seen is None else jnp.where(seen, 0.0, HIDDEN)
        found = [self.weights[2 * heads, first + i] for i in range(cut.outputs)]
        if seen is not None:
            found = [jnp.where(seen, bias, 0.0) for bias in found]
        for head in range(heads):
            mixed = self._mixed(logits, head, hidden)
            total = self._sum(head)
            softmax = jnp.exp2(mixed - lax.broadcast_in_dim(total, mixed.shape, [0]))
            found = [
                x + softmax * self.weights[heads + first + i, head] for i, x in enumerate(found)
            ]
        return found

    def _sum(self, head: int) -> Any:
        """log2 of the sums of a head's softmax, (queries,), in the registers of their rows."""
        if self.left is not None:
            return self.sums[self.tile, head]
        load: Any = plgpu.load
        index = self.tile, head
        if jax.__version_info__ < (0, 11):
            return load(self.sums, index, layout=_WGMMA.reduce(1))
        return load(self.sums.at[index], layout=_WGMMA.reduce(1))

    def _as_operands(self, maps: list[Any]) -> list[Any]:
        """Steps of maps as the bfloat16 parts of one tile."""
        found = []
        for part in range(self.cut.parts):
            small = [x.astype(jnp.bfloat16) for x in maps]
            found.append(small[0] if len(small) == 1 else jnp.concatenate(small, axis=1))
            if part + 1 < self.cut.parts:
                maps = [x - y.astype(jnp.float32) for x, y in zip(maps, small, strict=True)]
        return found

    def _lanes(self, value: float) -> Any:
        x = jnp.full((ROWS, LANES), value, jnp.float32)
        return x if self.left is not None else plgpu.layout_cast(x, _WGMMA)


def _transposed(ref: Any) -> Any:
    """Of a tile in shared memory; a method of refs since jax 0.11."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
