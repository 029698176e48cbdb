"""Training in phases, each with its own part of the network and its own learning rate."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int

from cait_jax.errors import UserError
from cait_jax.train.parts import scale_updates, trainable, without_frozen


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of a run.

    Attributes:
      steps: its length; the last phase goes on for as long as the run does.
      learning_rate: constant in it.
      part: what learns, see `cait_jax.train.parts.trainable`.
    """

    steps: int
    learning_rate: float
    part: str | int = "all"


class PhasedState(NamedTuple):
    """State of `in_phases`: steps taken, and the state of the optimiser inside."""

    count: Any
    inner: Any


def head_then_blocks(
    steps_per_epoch: float,
    *,
    head_epochs: float = 5.0,
    head_learning_rate: float = 1e-3,
    blocks: int = 4,
    blocks_epochs: float = 15.0,
    blocks_learning_rate: float = 1e-5,
) -> tuple[Phase, Phase]:
    """Fine-tuning on little data: first the new head alone, then with it the last blocks, slowly.

    Usually with a weight decay of 0.01.

    Args:
      steps_per_epoch: examples over batch size, not rounded.
      head_epochs: epochs for the head alone.
      head_learning_rate: in them.
      blocks: last blocks that learn afterwards, class-attention blocks being the last.
      blocks_epochs: epochs for these.
      blocks_learning_rate: in them, of head and blocks.

    Returns:
      The phases, in steps: at least one, where their epochs are above 0.
    """
    first = round(head_epochs * steps_per_epoch)
    both = round((head_epochs + blocks_epochs) * steps_per_epoch)
    # However short: a phase that is asked for has a step.
    first = max(first, int(head_epochs > 0))
    both = max(both, first + int(blocks_epochs > 0))
    return (
        Phase(first, head_learning_rate, "head"),
        Phase(both - first, blocks_learning_rate, blocks),
    )


def phase_at(phases: Sequence[Phase], step: Int[Array, ""] | int) -> Int[Array, ""]:
    """The index of the phase that a step belongs to, steps counted from 0."""
    return jnp.searchsorted(jnp.asarray(_starts(phases)[1:]), jnp.asarray(step), side="right")


def phase_rates(phases: Sequence[Phase]) -> optax.Schedule:
    """The phases' learning rates as a schedule.

    Raises:
      UserError: without phases, or for one of no steps.
    """
    _check(phases)
    return lambda step: jnp.asarray([phase.learning_rate for phase in phases])[
        phase_at(phases, step)
    ]


def phase_mask(phases: Sequence[Phase], params: Any, step: Int[Array, ""] | int) -> Any:
    """What learns in a step.

    Args:
      phases: of the run.
      params: a parameter tree, stacked or not.
      step: counted from 0; may be traced.

    Returns:
      Bool arrays that broadcast against the parameters; numpy arrays, known while tracing, for parameters
      that learn in all phases or in none.

    Raises:
      UserError: for a part that the network does not have.
    """
    phase = phase_at(phases, step)

    def at(*masks: np.ndarray) -> Any:
        if all(np.array_equal(mask, masks[0]) for mask in masks):
            return masks[0]
        return jnp.asarray(np.stack(masks))[phase]

    return jax.tree.map(at, *(trainable(params, phase.part) for phase in phases))


def in_phases(
    make: Callable[[optax.Schedule], optax.GradientTransformation], phases: Sequence[Phase]
) -> optax.GradientTransformation:
    """An optimiser that starts anew in every phase, with the phase's rate and part.

    Anew, because moments and their bias corrections that counted through the phases before would make the
    first updates of a newly freed parameter several times too large. The update of what is frozen is exactly 0.

    Args:
      make: from a schedule to an optimiser, such as `make_optimizer` with its other arguments filled in.
      phases: of the run.

    Returns:
      The transformation; it needs the parameters in `update`.

    Raises:
      UserError: without phases, or for one of no steps; while tracing, for a part that the network does not have.
    """
    rates = phase_rates(phases)
    optimizer = make(optax.constant_schedule(1.0))
    starts = _starts(phases)[1:]

    def init(params: Any) -> PhasedState:
        return PhasedState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(gradient: Any, state: PhasedState, params: Any = None) -> tuple[Any, PhasedState]:
        begins = jnp.any(starts == state.count)
        inner = jax.tree.map(
            lambda fresh, kept: jnp.where(begins, fresh, kept), optimizer.init(params), state.inner
        )
        mask = phase_mask(phases, params, state.count)
        updates, inner = optimizer.update(without_frozen(gradient, mask), inner, params)
        rate = rates(state.count)
        updates = jax.tree.map(lambda update: rate.astype(update.dtype) * update, updates)
        count = optax.safe_increment(state.count)
        return scale_updates(updates, mask), PhasedState(count, inner)

    return optax.GradientTransformation(init, update)


def _starts(phases: Sequence[Phase]) -> np.ndarray:
    return np.cumsum([0, *(phase.steps for phase in phases[:-1])], dtype=np.int32)


def _check(phases: Sequence[Phase]) -> None:
    if not phases or any(phase.steps < 1 for phase in phases):
        raise UserError(
            f"phases of {[phase.steps for phase in phases]} steps make no run: give at least one, each "
            "of at least 1 step, by more epochs"
        )
