"""What the GPUs' kernels do with tiles of tokens: the ring that one warpgroup fills, products and mixtures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cait_jax.kernels import HIDDEN
from cait_jax.kernels.gpu_plan import ALIGNED, KEYS, ROWS, WORKERS, Plan

_REGISTERS = {"worker": 240, "loader": 24}  # of a thread; 504 of the 512 that three warpgroups have
SWIZZLED = (plgpu.TilingTransform((ALIGNED, 16)), plgpu.SwizzleTransform(32))
WGMMA = plgpu.Layout.WGMMA


def launch(
    kernel: Callable[..., None], name: str, outs: Any, scratch: dict[str, Any], batch: int, cut: Plan, *,
    interpret: bool,
) -> Callable[..., Any]:  # fmt: skip
    """A program for each tile of each image: two warpgroups compute, one loads."""
    if interpret:  # whose wgmma takes no registers and nothing transposed
        scratch["left"] = plgpu.SMEM((WORKERS, ROWS, KEYS), jnp.bfloat16)
        scratch["right"] = plgpu.SMEM((WORKERS, cut.dim, cut.step), jnp.bfloat16)
    backend: Any = plgpu  # has an interpreter since jax 0.11
    run: Callable[..., Any] = plgpu.kernel(
        kernel,
        out_type=outs,
        scratch_types=scratch,
        grid=(cut.programs, batch),
        grid_names=("tile", "image"),
        num_threads=WORKERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=backend.InterpretGPUParams(
            out_of_bounds_reads="uninitialized", uninitialized_memory="zero"
        )
        if interpret
        else None,
        kernel_name=name,
    )
    return run


def packed(q: Any, k: Any, v: Any, cut: Plan) -> Any:
    """q, k and v side by side, rows of all images: in the network one array, which XLA finds again here."""
    batch, tokens = q.shape[:2]
    joined = jnp.concatenate([x.reshape(batch, tokens, cut.width) for x in (q, k, v)], axis=-1)
    return split(joined.reshape(batch * tokens, 3 * cut.width), cut.parts)


def split(x: Any, parts: int) -> Any:
    """bfloat16 arrays whose sum is `x`, to 8 bits a part, stacked."""
    found = []
    for _ in range(parts - 1):
        found.append(lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7))
        x = x - found[-1]
    return jnp.stack([part.astype(jnp.bfloat16) for part in (*found, x)])


def weight_rows(cut: Plan, *rows: Any) -> Any:
    """Rows of weights by head, padded to whole copies."""
    weights = jnp.concatenate(rows)
    return jnp.pad(weights, ((0, -len(weights) % 8), (0, -cut.heads % 4)))


class Program:
    """Where a program is: its image, and tokens as rows of the image's tiles, of which TMA wants every eighth."""

    def __init__(self, cut: Plan) -> None:
        self.warpgroup, self.image, self.index = map(lax.axis_index, ("warpgroup", "image", "tile"))
        # Rows of the first tile that are of the image before.
        shifted = lax.rem(self.image * cut.tokens, jnp.int32(ALIGNED))
        self.offset = shifted if cut.shift else jnp.int32(0)
        self.row = self.index * (cut.tiles * ROWS)
        self._first = self.image * cut.tokens - self.offset

    def rows(self, start: Any, size: int) -> Any:
        """Of the image, as rows of all images."""
        return pl.ds(pl.multiple_of(self._first + start, ALIGNED), size)


def divide(program: Program, load: Callable[[], None], compute: Callable[[], None]) -> None:
    """One warpgroup loads and the others compute, with as many registers as each needs."""

    @pl.when(program.warpgroup == WORKERS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS["loader"], action="decrease")
        load()

    @pl.when(program.warpgroup < WORKERS)
    def _() -> None:
        plgpu.set_max_registers(_REGISTERS["worker"], action="increase")
        compute()


class Ring:
    """Tiles in shared memory, filled in turns by one warpgroup and freed by those that compute."""

    def __init__(self, cut: Plan, tiles: Any, full: Any, free: Any) -> None:
        self.cut, self.tiles, self.full, self.free = cut, tiles, full, free

    def _slot(self, turn: Any) -> Any:
        return lax.rem(turn, jnp.int32(self.cut.slots))

    def put(self, turn: Any, source: Callable[[int], Any], *others: tuple[Any, Any]) -> None:
        """Starts the copies of a tile's parts and of `others`, from memory to one of an array of slots."""
        slot = self._slot(turn)

        @pl.when(turn >= self.cut.slots)
        def _() -> None:
            plgpu.barrier_wait(self.free.at[slot])

        for part in range(self.cut.parts):
            plgpu.copy_gmem_to_smem(source(part), self.tiles.at[slot, part], self.full.at[slot])
        for other, slots in others:
            plgpu.copy_gmem_to_smem(other, slots.at[slot], self.full.at[slot])

    def drain(self, turns: int) -> None:
        """Waits until the last of so many turns are free."""
        for turn in range(max(turns - self.cut.slots, 0), turns):
            plgpu.barrier_wait(self.free.at[turn % self.cut.slots])

    def take(self, turn: Any) -> Any:
        """The slot of a turn, when it is there."""
        slot = self._slot(turn)
        plgpu.barrier_wait(self.full.at[slot])
        return slot

    def give(self, slot: Any) -> None:
        """To the loader."""
        plgpu.barrier_arrive(self.free.at[slot])


class Worker:
    """A warpgroup that computes; `left` and `right` are there in the interpreter."""

    def __init__(self, cut: Any, program: Program, ring: Ring, *, weights: Any, zeros: Any, held: Any,
                 outputs: Any, left: Any = None, right: Any = None) -> None:  # fmt: skip
        self.cut, self.index, self.offset, self.ring = cut, program.warpgroup, program.offset, ring
        self.weights, self.zeros, self.held, self.outputs = weights, zeros, held, outputs
        self.left, self.right = left, right
        none = jnp.int32(0)
        self.tile: Any = none if cut.by_head else self.index
        self.half: Any = self.index if cut.by_head else none
        self.pairs = [
            (i, j) for i in range(cut.parts) for j in range(cut.parts) if i + j < cut.parts
        ]
        zeros[self.index] = jnp.zeros((128,), jnp.int32)
        plgpu.commit_smem()

    @property
    def interpreted(self) -> bool:
        """Whether Mosaic's interpreter runs this."""
        return self.left is not None

    def seen(self, j: Any, start: int) -> Any:
        """Which of a step's tokens, from `start` in tile `j`, are of this image; None if all are."""
        cut = self.cut
        if not cut.shift and cut.tokens % KEYS == 0:
            return None
        token = plgpu.broadcasted_iota(jnp.int32, (ROWS, cut.step), 1, layout=WGMMA)
        token = token + (j * KEYS + start - self.offset)
        return (token >= 0) & (token < cut.tokens)

    def products(self, start: int, *slots: Any) -> list[list[Any]]:
        """By slot and head, those of what is held for it and of a step of its rows, (rows, step)."""
        cut, heads = self.cut, self.cut.heads
        # Read each time, so that the compiler does not keep the addresses of all operands in registers.
        zero = self.zeros[self.index, 0]

        def run(*sums: Any) -> list[Any]:
            for i, slot in enumerate(slots):
                rows = self.held.at[i * cut.tiles + self.tile + zero]
                slot = zero if cut.slots == 1 else slot
                for head in range(heads):
                    columns = pl.ds(head * cut.dim, cut.dim)
                    for a, b in self.pairs:
                        other = self.ring.tiles.at[slot, b, pl.ds(start, cut.step), columns]
                        if self.right is not None:
                            self.right[self.index] = other[...].T
                            other = self.right.at[self.index]
                        else:
                            other = _transposed(other)
                        plgpu.wgmma(sums[i * heads + head], rows.at[a, :, columns], other)
            return [total[...] for total in sums]

        count = heads * len(slots)
        sums = [plgpu.WGMMAAccumulatorRef((ROWS, cut.step), jnp.float32)] * count
        found: list[Any] = pl.run_scoped(run, *sums)
        return [found[i : i + heads] for i in range(0, count, heads)]

    def mixture(self, maps: list[Any], row: Any, begin: Any = None) -> Any:
        """Sum over heads of their maps, weighted by a row of the weights, and of `begin`."""
        total = maps[0] * self.weights[row, 0]
        if begin is not None:
            total = total + begin
        for head in range(1, self.cut.heads):
            total = total + maps[head] * self.weights[row, head]
        return total

    def by_row(self, ref: Any, head: Any) -> Any:
        """A number for each of this warpgroup's rows, in the registers of maps."""
        found = self._load(ref, (self.tile, head), 1)
        return lax.broadcast_in_dim(found, (ROWS, self.cut.step), [0])

    def by_column(self, ref: Any, slot: Any, head: Any, start: int) -> Any:
        """A number for each of a step's tokens, in the registers of maps."""
        found = self._load(ref, (slot, head, pl.ds(start, self.cut.step)), 0)
        found = lax.broadcast_in_dim(found, (ROWS, self.cut.step), [1])
        return found if self.interpreted else plgpu.layout_cast(found, WGMMA)

    def _load(self, ref: Any, index: Any, axis: int) -> Any:
        """One row, in the registers that maps have when reduced over an axis."""
        if self.interpreted:
            return ref[index]
        load: Any = plgpu.load
        layout = WGMMA.reduce(axis)
        if jax.__version_info__ < (0, 11):
            return load(ref, index, layout=layout)
        return load(ref.at[index], layout=layout)

    def accumulate(self, total: Any, steps: list[list[Any]], slot: Any, head: Any) -> None:
        """Adds the product of maps, the parts of each step, and a head of a slot's tile."""
        columns = pl.ds(pl.multiple_of(head * self.cut.dim, 16), self.cut.dim)
        for a, b in self.pairs:
            small = [parts[a] for parts in steps]
            left = small[0] if len(small) == 1 else jnp.concatenate(small, axis=1)
            if self.left is not None:
                self.left[self.index] = left
                left = self.left.at[self.index]
            plgpu.wgmma(total, left, self.ring.tiles.at[slot, b, :, columns])

    def narrow(self, maps: Any) -> list[Any]:
        """As bfloat16 parts."""
        found = []
        for part in range(self.cut.parts):
            found.append(maps.astype(jnp.bfloat16))
            if part + 1 < self.cut.parts:
                maps = maps - found[-1].astype(jnp.float32)
        return found

    def lanes(self, value: float, columns: int = ALIGNED) -> Any:
        """A number in the registers of maps."""
        x = jnp.full((ROWS, columns), value, jnp.float32)
        return x if self.interpreted else plgpu.layout_cast(x, WGMMA)

    def write(self, found: list[Any], out: Any, start: Any, head: Any, begun: bool = False) -> None:
        """By head, (rows, dim), through shared memory; `begun` when something is being written already."""
        cut = self.cut
        for i in range(0, cut.outputs, cut.staged):
            if begun or i:
                plgpu.wait_smem_to_gmem(0)
            for j in range(cut.staged):
                self._stage(pl.ds(j * cut.dim, cut.dim), found[i + j].astype(out.dtype))
            plgpu.commit_smem()
            columns = pl.ds((head + i) * cut.dim, cut.staged * cut.dim)
            plgpu.copy_smem_to_gmem(
                self.outputs.at[self.index], out.at[pl.ds(start, ROWS), columns]
            )

    def _stage(self, columns: Any, values: Any) -> None:
        """Banks conflict, which jax 0.12 wants to be told."""
        backend: Any = plgpu
        if hasattr(backend, "store") and not self.interpreted:
            backend.store(self.outputs.at[self.index, :, columns], values, optimized=False)
        else:
            self.outputs[self.index, :, columns] = values


def hidden_where_not(seen: Any) -> Any:
    """What hides logits of other images; None if there are none."""
    return None if seen is None else jnp.where(seen, 0.0, HIDDEN)


def _transposed(ref: Any) -> Any:
    """Of a tile in shared memory; a method of refs since jax 0.11."""
    return ref.transpose((1, 0)) if hasattr(ref, "transpose") else plgpu.transpose_ref(ref, (1, 0))
