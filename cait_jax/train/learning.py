"""How a run learns, from its config: phases, length, schedule and optimiser."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from cait_jax.train.optimizer import make_optimizer
from cait_jax.train.parts import by_part, layer_decay, trainable
from cait_jax.train.phases import Phase, head_then_blocks, in_phases, phase_rates
from cait_jax.train.schedule import Decay, epoch_schedule, step_schedule


def phases_of(config: ConfigDict, steps_per_epoch: float) -> tuple[Phase, ...]:
    """The phases of a run; none where it has the same schedule throughout."""
    phases = config.phases
    both = head_then_blocks(
        steps_per_epoch,
        head_epochs=phases.head_epochs,
        head_learning_rate=phases.head_learning_rate,
        blocks=phases.blocks,
        blocks_epochs=phases.blocks_epochs,
        blocks_learning_rate=phases.blocks_learning_rate,
    )
    return both if phases.head_epochs else ()


def length_of(config: ConfigDict, phases: Sequence[Phase], steps_per_epoch: float) -> int:
    """Steps of a run."""
    if config.steps:
        return config.steps
    if phases:
        return sum(phase.steps for phase in phases)
    return max(1, round(config.epochs * steps_per_epoch))


def schedule_of(
    config: ConfigDict, phases: Sequence[Phase], total_steps: int, examples: int
) -> optax.Schedule:
    """The learning rate of each step."""
    if phases:
        return phase_rates(phases)
    optimizer, batch_size = config.optimizer, config.batch_size
    reference = optimizer.reference_batch
    drops = {"decay_epochs": optimizer.decay_epochs, "decay_rate": optimizer.decay_rate}
    decay = Decay(
        kind=optimizer.schedule,
        peak=optimizer.learning_rate * (batch_size / reference if reference else 1.0),
        epochs=total_steps * batch_size / examples if config.steps else config.epochs,
        warmup_epochs=optimizer.warmup_epochs,
        warmup_from=optimizer.warmup_learning_rate,
        final=optimizer.final_learning_rate,
        **{key: value for key, value in drops.items() if value is not None},
    )
    if optimizer.per_epoch:
        return epoch_schedule(decay, examples=examples, batch_size=batch_size)
    return step_schedule(decay, examples=examples, batch_size=batch_size, total_steps=total_steps)


def optimizer_of(
    config: ConfigDict, schedule: optax.Schedule, phases: Sequence[Phase]
) -> optax.GradientTransformation:
    """The optimiser, with layer-wise rates, frozen parts or phases."""
    optimizer = config.optimizer
    make = functools.partial(
        make_optimizer,
        name=optimizer.name,
        b1=optimizer.b1,
        b2=optimizer.b2,
        eps=optimizer.eps,
        momentum=optimizer.momentum,
        nesterov=optimizer.nesterov,
        weight_decay=optimizer.weight_decay,
        clip_norm=optimizer.grad_clip_norm,
    )
    if phases:
        return in_phases(make, phases)
    part, decay = part_of(optimizer.train), optimizer.layer_decay
    if part == "all" and decay == 1.0:
        return make(schedule)

    def factors(params: Any) -> Any:
        learns, rates = trainable(params, part), layer_decay(params, decay)
        return jax.tree.map(lambda learns, rate: learns * rate, learns, rates)

    return by_part(make(schedule), factors)


def part_of(name: str) -> str | int:
    """What learns, as `cait_jax.train.parts.trainable` takes it, from a word of the command line."""
    return int(name) if name.isdecimal() else name
