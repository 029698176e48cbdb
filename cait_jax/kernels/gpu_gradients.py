"""What warpgroups of the GPUs' backward kernels compute; see `gpu_backward` for the names of what they sum."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from cait_jax.kernels.gpu_plan import ALIGNED, KEYS, ROWS
from cait_jax.kernels.gpu_tiles import WGMMA, Worker, hidden_where_not


class _Worker(Worker):
    def __init__(self, *given: Any, **scratch: Any) -> None:
        super().__init__(*given, **scratch)
        cut = self.cut
        self.head = jnp.minimum(self.half * cut.group, cut.heads - cut.group)
        self.outs = [plgpu.WGMMAAccumulatorRef((ROWS, cut.dim), jnp.float32)] * cut.group

    def take(self, pair: Any) -> tuple[Any, Any]:
        """The slots of two tiles of the same tokens."""
        return self.ring.take(2 * pair), self.ring.take(2 * pair + 1)

    def give(self, slots: tuple[Any, Any]) -> None:
        """To the loader."""
        for slot in slots:
            self.ring.give(slot)

    def accumulate_all(
        self, sums: Any, steps: list[list[Any]], slots: tuple[Any, Any], factor: int
    ) -> None:
        """Adds products of each step's maps, by head, and one of two tiles, which are then given back."""
        for i, total in enumerate(sums):
            self.accumulate(total, [step[i] for step in steps], slots[factor], self.head + i)
        plgpu.wgmma_wait(0)
        self.give(slots)

    def d_softmax(self, d_maps: list[Any], g: Any, begin: Any = None) -> Any:
        """A dP times log(2), and `begin`."""
        return self.mixture(d_maps, self.cut.heads + g, begin)

    def add_mixed(self, found: list[Any], d_mixed: Any, g: int) -> list[Any]:
        """A dX times log(2) added to the dS of this warpgroup's heads."""
        weights = [self.weights[g, self.head + i] for i in range(self.cut.group)]
        terms = [d_mixed * weight for weight in weights]
        return [x + y for x, y in zip(found, terms, strict=True)] if found else terms


class ByQuery(_Worker):
    """Rows are queries, columns keys."""

    def __init__(
        self, *given: Any, sums: Any, deltas: Any, by_pair: Any, totals: Any, measured: Any, **scratch: Any
    ) -> None:  # fmt: skip
        super().__init__(*given, **scratch)
        self.sums, self.deltas, self.by_pair = sums, deltas, by_pair
        self.totals, self.measured = totals, measured

    def softmax(self, logits: list[Any], g: Any, hidden: Any) -> Any:
        """A P."""
        begin = -self.by_row(self.sums, g)
        return jnp.exp2(self.mixture(logits, g, begin if hidden is None else begin + hidden))

    def measure(self) -> None:
        """Delta of this warpgroup's heads, and the gradient of `post`, into shared memory."""
        cut = self.cut

        def step(carry: Any, logits: list[Any], d_maps: list[Any], hidden: Any) -> Any:
            deltas, totals = map(list, carry)
            for i in range(cut.group):
                softmax = self.softmax(logits, self.head + i, hidden)
                deltas[i] = deltas[i] + softmax * self.d_softmax(d_maps, self.head + i)
                self._add(totals, i, softmax, d_maps)
            return tuple(deltas), tuple(totals)

        begin = (self.lanes(0.0),) * cut.group, self._no_totals()
        deltas, totals = self._sweep(0, step, begin)
        for i, delta in enumerate(deltas):
            self.deltas[self.tile, self.head + i] = delta.sum(axis=1)
        self._keep(totals, 0)
        plgpu.barrier_arrive(self.measured)
        plgpu.barrier_wait(self.measured)

    def first_mixture(self) -> None:
        """The gradient of `pre` into shared memory."""

        def step(totals: Any, logits: list[Any], d_maps: list[Any], hidden: Any) -> Any:
            totals = list(totals)
            for i in range(self.cut.group):
                d_mixed = self._d_mixed(logits, d_maps, self.head + i, hidden)
                self._add(totals, i, d_mixed, logits)
            return tuple(totals)

        self._keep(self._sweep(1, step, self._no_totals()), self.cut.group * self.cut.heads)

    def queries(self) -> list[Any]:
        """dQ of this warpgroup's heads."""
        cut = self.cut

        def run(*sums: Any) -> list[Any]:
            @pl.loop(0, cut.blocks)
            def _(j: Any) -> None:
                slots = self.take(2 * cut.blocks + j)
                steps = []
                for start in range(0, KEYS, cut.step):
                    logits, d_maps = self.products(start, *slots)
                    hidden = hidden_where_not(self.seen(j, start))
                    found: list[Any] = []
                    for g in range(cut.heads):
                        d_mixed = self._d_mixed(logits, d_maps, g, hidden)
                        found = self.add_mixed(found, d_mixed, g)
                    steps.append([self.narrow(x) for x in found])
                self.accumulate_all(sums, steps, slots, 0)

            return [total[...] for total in sums]

        found: list[Any] = pl.run_scoped(run, *self.outs)
        return found

    def _d_mixed(self, logits: list[Any], d_maps: list[Any], g: Any, hidden: Any) -> Any:
        """A dX times log(2)."""
        d_mixed = self.d_softmax(d_maps, g, -self.by_row(self.deltas, g))
        return self.softmax(logits, g, hidden) * d_mixed

    def _sweep(self, sweep: int, step: Any, begin: Any) -> Any:
        """What `step` makes of `begin`, logits, gradients of maps and what to add to hide keys, over all keys."""
        cut = self.cut

        def block(j: Any, carry: Any) -> Any:
            slots = self.take(sweep * cut.blocks + j)
            for start in range(0, KEYS, cut.step):
                logits, d_maps = self.products(start, *slots)
                carry = step(carry, logits, d_maps, hidden_where_not(self.seen(j, start)))
            self.give(slots)
            return carry

        found: tuple[Any, ...] = lax.fori_loop(0, cut.blocks, block, begin)
        return found

    def add_up(self) -> None:
        """The totals of all pairs."""
        plgpu.commit_smem()
        if self.interpreted:
            pairs = self.by_pair[self.index]
        else:
            load: Any = plgpu.load
            pairs = load(self.by_pair.at[self.index], layout=WGMMA, optimized=False)
        self.totals[self.index] = pairs.sum(axis=1)

    def _no_totals(self) -> tuple[Any, ...]:
        found: tuple[Any, ...] = (self.lanes(0.0),) * (self.cut.group * self.cut.heads)
        return found

    def _keep(self, totals: Any, first: int) -> None:
        for i, total in enumerate(totals):
            self.by_pair[self.index, first + i] = total.sum(axis=1)

    def _add(self, totals: list[Any], i: int, x: Any, maps: list[Any]) -> None:
        """To each head's total the products of `x` and its map: what is to be summed in the end."""
        for n, each in enumerate(maps, i * self.cut.heads):
            if self.interpreted:
                totals[n] = totals[n] + x * each
            else:
                totals[n] = _add_of_threads(totals[n], x, each)


class ByKey(_Worker):
    """Rows are keys, columns queries."""

    def __init__(self, *given: Any, statistics: Any, **scratch: Any) -> None:
        super().__init__(*given, **scratch)
        self.statistics = statistics

    def softmax(self, logits: list[Any], g: int, slots: tuple[Any, Any], start: int) -> Any:
        """A P."""
        total = self.by_column(self.statistics, slots[0], g, start)
        return jnp.exp2(self.mixture(logits, g, -total))

    def values(self) -> list[Any]:
        """dV of this warpgroup's heads."""
        cut, heads = self.cut, self.cut.heads

        def maps(j: Any, start: int, slots: tuple[Any, Any]) -> list[Any]:
            (logits,) = self.products(start, slots[0])
            seen = self.seen(j, start)
            found = [self.weights[3 * heads, self.head + i] for i in range(cut.group)]
            if seen is not None:
                found = [jnp.where(seen, bias, 0.0) for bias in found]
            for g in range(heads):
                softmax = self.softmax(logits, g, slots, start)
                found = [
                    x + softmax * self.weights[2 * heads + g, self.head + i]
                    for i, x in enumerate(found)
                ]
            return found

        return self._sum(0, maps, 1)

    def keys(self) -> list[Any]:
        """dK of this warpgroup's heads."""

        def d_logits(j: Any, start: int, slots: tuple[Any, Any]) -> list[Any]:
            logits, d_maps = self.products(start, *slots)
            found: list[Any] = []
            for g in range(self.cut.heads):
                delta = self.by_column(self.statistics, slots[1], g, start)
                d_mixed = self.d_softmax(d_maps, g, -delta)
                d_mixed = self.softmax(logits, g, slots, start) * d_mixed
                found = self.add_mixed(found, d_mixed, g)
            return found

        return self._sum(1, d_logits, 0)

    def _sum(self, sweep: int, maps: Any, factor: int) -> list[Any]:
        """Of all steps' maps times one of the two tiles, by head."""
        cut = self.cut

        def run(*sums: Any) -> list[Any]:
            @pl.loop(0, cut.blocks)
            def _(j: Any) -> None:
                slots = self.take(sweep * cut.blocks + j)
                steps = [
                    [self.narrow(x) for x in maps(j, start, slots)]
                    for start in range(0, KEYS, cut.step)
                ]
                self.accumulate_all(sums, steps, slots, factor)

            return [total[...] for total in sums]

        found: list[Any] = pl.run_scoped(run, *self.outs)
        return found


def _add_of_threads(total: Any, x: Any, y: Any) -> Any:
    """Adds to the first of each thread's elements of `total`, whose others are 0 and need no registers."""
    from jax.experimental.mosaic import gpu as mosaic
    from jaxlib.mlir.dialects import math, vector

    backend: Any = plgpu
    fma: Any = math.fma
    out = backend.ShapeDtypeStruct((ROWS, ALIGNED), jnp.float32, layout=WGMMA)

    def add(context: Any, total: Any, x: Any, y: Any) -> Any:
        registers = total.registers.copy()
        first = registers.flat[0]
        number = vector.extract(first, [], [0])
        for a, b in zip(x.registers.flat, y.registers.flat, strict=True):
            for i in range(2):
                pair = (vector.extract(each, [], [i]) for each in (a, b))
                number = fma(*pair, number)
        registers.flat[0] = vector.insert(number, first, [], [0])
        array: Any = mosaic.FragmentedArray
        return array(_registers=registers, _layout=total.layout, _is_signed=None)

    inline = backend.inline_mgpu(arg_types=(WGMMA, WGMMA, WGMMA), return_type=out)
    return inline(add)(total, x, y)
