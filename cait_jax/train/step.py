"""One training step: a pure function of (state, batch)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array

from cait_jax.data.augment import Augmentation, augment, normalise
from cait_jax.train.losses import correct, cross_entropy
from cait_jax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs beside the state and the batch.

    Attributes:
      seed: of the run; each step's keys are folded from it and the step.
      mean: of each channel, on a scale from 0 to 1.
      std: likewise.
      augmentation: what is drawn for each image.
      label_smoothing: see `cross_entropy`.
      accumulate: micro batches a step, their gradients averaged.
      ema_decay: of the average of the parameters; 0 for none.
    """

    seed: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    label_smoothing: float = 0.0
    accumulate: int = 1
    ema_decay: float = 0.0


def make_train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    recipe: Recipe,
) -> TrainStep:
    """Builds the step.

    Args:
      model: applied as `model.apply(variables, images, train=True, example_ids=..., rngs=...)`.
      optimizer: an Optax chain that follows `schedule`.
      schedule: step to learning rate.
      recipe: everything else.

    Returns:
      A function of a state and a batch (`image` uint8 (batch, height, width, channels), `label` int32
      (batch,)), which gives the next state and the scalars `loss` (mean, nats), `accuracy` (0 to 1),
      `learning_rate` (as applied in this step) and `grad_norm` (before clipping). Not yet jitted.
    """

    def loss_and_accuracy(params: Any, batch: Batch, keys: dict[str, Array]) -> Any:
        images = batch["image"].astype(jnp.float32)
        images = augment(keys["augment"], images, batch["id"], recipe.augmentation)
        images = normalise(images, recipe.mean, recipe.std)
        logits: Any = model.apply(
            {"params": params},
            images,
            train=True,
            example_ids=batch["id"],
            rngs={"dropout": keys["dropout"], "drop_path": keys["drop_path"]},
        )
        losses = cross_entropy(logits, batch["label"], recipe.label_smoothing)
        return losses.mean(), correct(logits, batch["label"]).mean()

    gradient_of = jax.value_and_grad(loss_and_accuracy, has_aux=True)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        names = ("augment", "dropout", "drop_path")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        batch = batch | {"id": jnp.arange(batch["label"].shape[0])}

        def part(micro: Batch) -> Any:
            return gradient_of(state.params, micro, keys)

        (loss, accuracy), gradient = mean_over_micro_batches(part, batch, recipe.accumulate)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if recipe.ema_decay:
            ema = optax.incremental_update(params, ema, step_size=1.0 - recipe.ema_decay)
        metrics = {
            "loss": loss,
            "accuracy": accuracy,
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(gradient),
        }
        return TrainState(state.step + 1, params, opt_state, ema), metrics

    return train_step


def mean_over_micro_batches(function: Callable[[Batch], Any], batch: Batch, count: int) -> Any:
    """Averages `function` over `count` equal parts of a batch, holding one part's intermediates at a time.

    Part i holds the examples i, i + count, i + 2 * count, ...: each device cuts its own rows, so nothing moves
    between devices.

    Args:
      function: of a batch, giving any tree of arrays.
      batch: arrays with a leading batch axis that `count` divides.
      count: number of parts.

    Returns:
      The mean of the trees.
    """
    if count == 1:
        return function(batch)

    def micro(array: Array) -> Array:
        return jnp.swapaxes(array.reshape(-1, count, *array.shape[1:]), 0, 1)

    def accumulate(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(part)), None

    parts = jax.tree.map(micro, batch)
    first = jax.tree.map(lambda array: array[0], parts)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(accumulate, zeros, parts)
    return jax.tree.map(lambda leaf: leaf / count, total)
