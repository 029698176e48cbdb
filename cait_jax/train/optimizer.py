"""Learning-rate schedule, weight-decay mask and optimiser of a run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from cait_jax.errors import UserError, nearest

OPTIMIZERS = ("adamw", "lamb", "lion", "muon", "sgd")
SCHEDULES = ("cosine", "step")


class Optimizer(NamedTuple):
    """An optimiser and what belongs to it.

    Attributes:
      transformation: the Optax chain, which follows `schedule`.
      schedule: step to learning rate.
      total_steps: of the run.
      freeze: of `cait_jax.train.step.make_train_step`.
    """

    transformation: optax.GradientTransformation
    schedule: optax.Schedule
    total_steps: int
    freeze: Callable[[Any, Any], Any] | None = None


def from_config(config: ConfigDict, examples: int) -> Optimizer:
    """The optimiser of a config, for a training split of so many examples.

    Raises:
      UserError: for phases or a trained part that make no sense.
    """
    settings = config.optimizer
    keys = ("name", "b1", "b2", "eps", "momentum", "nesterov")
    arguments = {key: settings[key] for key in keys}
    weight_decay: Any = settings.weight_decay
    if settings.final_weight_decay is not None:
        weight_decay = cosine_schedule(
            weight_decay, settings.final_weight_decay, steps_of(config, examples)
        )

    def make(schedule: optax.Schedule) -> optax.GradientTransformation:
        return make_optimizer(
            schedule, clip_norm=settings.grad_clip_norm, weight_decay=weight_decay, **arguments
        )

    if config.phases.head_epochs:
        from cait_jax.train import layer_groups

        return Optimizer(*layer_groups.phased_from_config(config, examples, make))
    total_steps = steps_of(config, examples)
    schedule = schedule_from_config(config, examples, total_steps)
    if settings.train == "all" and settings.layer_decay == 1.0:
        return Optimizer(make(schedule), schedule, total_steps)
    from cait_jax.train import layer_groups

    transformation, freeze = layer_groups.grouped_from_config(config, make(schedule))
    return Optimizer(transformation, schedule, total_steps, freeze)


def steps_of(config: ConfigDict, examples: int) -> int:
    """Steps of a run without phases, for a training split of so many examples."""
    steps: int = config.steps or max(1, round(config.epochs * (examples / config.batch_size)))
    return steps


def cosine_schedule(start: float, final: float, total_steps: int) -> optax.Schedule:
    """`final + (start - final) * (1 + cos(pi * step / total_steps)) / 2`, of which step 0 has `start`.

    So weight decay and the teacher's momentum grow in self-supervised training (Caron et al., arXiv 2104.14294).
    """

    def schedule(step: Any) -> Any:
        return final + (start - final) * (1 + jnp.cos(jnp.pi * step / total_steps)) / 2

    return schedule


def decay_mask(params: Any) -> Any:
    """True for kernels and their adapters, which decay; False for all else, such as biases, norms and tokens.

    By name, since the rank of an array would not tell: parameters of stacked blocks have one axis more.
    """
    decayed = ("kernel", "lora_a", "lora_b")
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key in decayed, params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float | optax.Schedule = 0.05,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """An optimiser with `decay_mask` and optional clipping, the same for stacked and single blocks.

    Args:
      schedule: step to learning rate.
      name: `"adamw"` (arXiv 1711.05101), the paper's; `"lamb"` (arXiv 1904.00962) as timm has it; `"lion"` (arXiv
        2302.06675); `"muon"`, see `cait_jax.train.muon`; `"sgd"`.
      b1: decay of the first moment; of Lion the share of the old moment in its step. Not for SGD.
      b2: decay of the second moment; Lion's decay of its only one, usually 0.99. Not for SGD.
      eps: added to the root of the second moment, of AdamW, LAMB and Muon; None: 1e-8, of LAMB 1e-6 (timm's).
      momentum: of SGD; 0 for none.
      nesterov: of SGD.
      weight_decay: of kernels, a number or from step to one. Decoupled and multiplied by the learning rate; of SGD
        added to the gradient (L2), as in the paper's transfers.
      clip_norm: largest global norm of the gradient; 0: no clipping; None: no clipping, of LAMB 1 (timm's).

    Raises:
      UserError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"there is no optimizer {name!r}; {nearest(name, OPTIMIZERS)}")
    if eps is None:
        eps = 1e-6 if name == "lamb" else 1e-8
    if clip_norm is None:
        clip_norm = 1.0 if name == "lamb" else 0.0
    decay: dict[str, Any] = {"weight_decay": weight_decay, "mask": decay_mask}
    if name == "adamw":
        optimizer = optax.adamw(schedule, b1, b2, eps, **decay)
    elif name == "lion":
        optimizer = optax.lion(schedule, b1, b2, **decay)
    elif name == "lamb":
        from cait_jax.train.lamb import lamb

        optimizer = lamb(schedule, b1=b1, b2=b2, eps=eps, **decay)
    elif name == "muon":
        from cait_jax.train.muon import muon

        optimizer = muon(schedule, b1=b1, b2=b2, eps=eps, **decay)
    else:
        optimizer = optax.chain(
            optax.add_decayed_weights(**decay),
            optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
        )
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def schedule_from_config(config: ConfigDict, examples: int, total_steps: int) -> optax.Schedule:
    """The learning rate of each step."""
    settings, batch_size = config.optimizer, config.batch_size
    reference = settings.reference_batch
    drops = {"decay_epochs": settings.decay_epochs, "decay_rate": settings.decay_rate}
    decay = Decay(
        kind=settings.schedule,
        peak=settings.learning_rate * (batch_size / reference if reference else 1.0),
        epochs=total_steps * batch_size / examples if config.steps else config.epochs,
        warmup_epochs=settings.warmup_epochs,
        warmup_from=settings.warmup_learning_rate,
        final=settings.final_learning_rate,
        **{key: value for key, value in drops.items() if value is not None},
    )
    if settings.per_epoch:
        return epoch_schedule(decay, examples=examples, batch_size=batch_size)
    return step_schedule(decay, examples=examples, batch_size=batch_size, total_steps=total_steps)


@dataclasses.dataclass(frozen=True)
class Decay:
    """Linear warm-up followed by a decay, with times in epochs.

    Attributes:
      peak: rate at the end of the warm-up.
      epochs: length of the run.
      kind: `"cosine"`, from `peak` to `final`; or `"step"`, times `decay_rate` every `decay_epochs` epochs,
        counted from the start of the run.
      warmup_epochs: length of the warm-up, which is part of `epochs`.
      warmup_from: rate at the start.
      final: rate at the end of the cosine; may exceed `peak`.
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
        if self.kind not in SCHEDULES:
            raise UserError(
                f"there is no optimizer.schedule {self.kind!r}; {nearest(self.kind, SCHEDULES)}"
            )

    def after(self, epochs: int | float) -> float:
        """The rate after some epochs, as timm's `CosineLRScheduler` and `StepLRScheduler` have it.

        The cosine spans the whole run, warm-up included.
        """
        if epochs < self.warmup_epochs:
            return self.warmup_from + epochs * (self.peak - self.warmup_from) / self.warmup_epochs
        if self.kind == "step":
            return self.peak * float(self.decay_rate ** (epochs // self.decay_epochs))
        progress = min(epochs / self.epochs, 1.0)
        return self.final + (self.peak - self.final) * (1 + math.cos(math.pi * progress)) / 2


def epoch_schedule(decay: Decay, *, examples: int, batch_size: int) -> optax.Schedule:
    """The schedule of DeiT's published code (facebookresearch/deit, `main.py`): one rate an epoch.

    Its scheduler is called after each epoch with the number of that epoch. So epochs 0 and 1 both have the
    first rate of the warm-up, and epoch e > 1 has `decay.after(e - 1)`. Step s belongs to epoch
    `s * batch_size // examples`.
    """
    epochs = range(max(1, math.ceil(decay.epochs)))
    starts = [_first_step(epoch, examples, batch_size) for epoch in epochs]
    return _piecewise(starts, [decay.after(max(epoch - 1, 0)) for epoch in epochs])


def step_schedule(
    decay: Decay, *, examples: int, batch_size: int, total_steps: int
) -> optax.Schedule:
    """One rate a step. The cosine starts at the end of the warm-up; `"step"` is timm's, updated every step."""
    warmup_steps = round(decay.warmup_epochs * examples / batch_size)
    if decay.kind == "cosine":
        return optax.warmup_cosine_decay_schedule(
            init_value=decay.warmup_from,
            peak_value=decay.peak,
            warmup_steps=warmup_steps,
            decay_steps=max(total_steps, warmup_steps + 1),  # a run may end in its warm-up
            end_value=decay.final,
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


def _first_step(epoch: int | Fraction, examples: int, batch_size: int) -> int:
    """The first step s with s * batch_size >= epoch * examples."""
    return math.ceil(Fraction(epoch) * examples / batch_size)


def _piecewise(starts: Sequence[int], rates: Sequence[float]) -> optax.Schedule:
    """`rates[i]` from step `starts[i]` on. Integers only, as float32 does not hold every step."""
    later, table = np.asarray(starts[1:], np.int32), np.asarray(rates, np.float64)
    return lambda step: jnp.asarray(table)[jnp.searchsorted(later, step, side="right")]
