"""Learning-rate schedules: pure functions from the step to the rate."""

import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import optax

from cait_jax.errors import UserError, nearest

KINDS = ("cosine", "step")
"""How the rate decays after the warm-up."""


@dataclasses.dataclass(frozen=True)
class Decay:
    """Linear warm-up followed by a decay, with times in epochs.

    Attributes:
      kind: `"cosine"`, from `peak` to `final`; or `"step"`, times `decay_rate` every `decay_epochs` epochs,
        which are counted from the start of the run.
      peak: rate at the end of the warm-up.
      epochs: length of the run.
      warmup_epochs: length of the warm-up, which is part of `epochs`.
      warmup_from: rate at the start.
      final: rate at the end of the cosine. May exceed `peak`.
      decay_epochs: of `"step"`.
      decay_rate: of `"step"`.

    Raises:
      UserError: from the constructor, for an unknown kind.
    """

    peak: float
    epochs: float
    kind: str = "cosine"
    warmup_epochs: float = 5.0
    warmup_from: float = 1e-6
    final: float = 1e-5
    decay_epochs: float = 30.0
    decay_rate: float = 0.1

    def __post_init__(self) -> None:
        """Checks the kind."""
        if self.kind not in KINDS:
            raise UserError(
                f"there is no optimizer.schedule {self.kind!r}; {nearest(self.kind, KINDS)}"
            )

    def after(self, epochs: int | float) -> float:
        """The rate after some epochs, as timm's `CosineLRScheduler` and `StepLRScheduler` have it.

        The cosine is over the whole run, without a prefix for the warm-up.
        """
        if epochs < self.warmup_epochs:
            return self.warmup_from + epochs * (self.peak - self.warmup_from) / self.warmup_epochs
        if self.kind == "step":
            return self.peak * self.decay_rate ** (epochs // self.decay_epochs)
        share = min(epochs / self.epochs, 1.0)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * share)) / 2


def epoch_schedule(decay: Decay, *, examples: int, batch_size: int) -> optax.Schedule:
    """The schedule of DeiT's published code (facebookresearch/deit, `main.py`): one rate an epoch.

    Its scheduler is called after each epoch with the number of that epoch. So epochs 0 and 1 both have the
    first rate of the warm-up, and epoch e > 1 has `decay.after(e - 1)`.

    Args:
      decay: warm-up and decay.
      examples: of the training split.
      batch_size: images a step. Step s belongs to epoch `s * batch_size // examples`.

    Returns:
      Step to rate: a lookup in a float64 table, by integers.
    """
    epochs = range(max(1, math.ceil(decay.epochs)))
    starts = [_first_step(epoch, examples, batch_size) for epoch in epochs]
    return _piecewise(starts, [decay.after(max(epoch - 1, 0)) for epoch in epochs])


def step_schedule(
    decay: Decay, *, examples: int, batch_size: int, total_steps: int
) -> optax.Schedule:
    """A rate for every step.

    The cosine starts at the end of the warm-up. The `"step"` decay is timm's, updated every step.

    Args:
      decay: warm-up and decay.
      examples: of the training split.
      batch_size: images a step.
      total_steps: steps of the run.

    Returns:
      Step to rate.
    """
    warmup_steps = round(decay.warmup_epochs * examples / batch_size)
    if decay.kind == "cosine":
        return warmup_cosine_schedule(
            peak=decay.peak,
            total_steps=total_steps,
            warmup_steps=warmup_steps,
            warmup_from=decay.warmup_from,
            final=decay.final,
        )
    every = Fraction(decay.decay_epochs)
    drops = range(1 + int(Fraction(total_steps * batch_size, examples) // every))
    steps = _piecewise(
        [_first_step(drop * every, examples, batch_size) for drop in drops],
        [decay.peak * decay.decay_rate**drop for drop in drops],
    )
    if warmup_steps == 0:
        return steps
    warmup = optax.linear_schedule(decay.warmup_from, decay.peak, warmup_steps)
    return lambda step: jnp.where(step < warmup_steps, warmup(step), steps(step))


def warmup_cosine_schedule(
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    warmup_from: float = 1e-6,
    final: float = 1e-5,
) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final` over the steps that are left.

    Args:
      peak: rate at the end of the warm-up.
      total_steps: steps of the run, including the warm-up. The rate of a step is that of its start, so the last
        step runs slightly above `final`.
      warmup_steps: steps of the warm-up. If longer than the run, the run ends during it.
      warmup_from: rate of step 0.
      final: rate at `total_steps`.

    Returns:
      Step to rate.
    """
    cosine = optax.cosine_decay_schedule(
        peak, max(total_steps - warmup_steps, 1), alpha=final / peak if peak else 0.0
    )
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(warmup_from, peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


def _first_step(epoch: int | Fraction, examples: int, batch_size: int) -> int:
    """The first step s with s * batch_size >= epoch * examples."""
    return math.ceil(Fraction(epoch) * examples / batch_size)


def _piecewise(starts: Sequence[int], rates: Sequence[float]) -> optax.Schedule:
    """`rates[i]` from step `starts[i]` on. Integers only, as float32 does not hold every step."""
    later, table = np.asarray(starts[1:], np.int32), np.asarray(rates, np.float64)
    return lambda step: jnp.asarray(table)[jnp.searchsorted(later, step, side="right")]
