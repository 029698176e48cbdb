"""One training step: a pure function of (state, batch), and of a teacher where there is one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array

from cait_jax.augment.mixup import Mixup, mix, soft_labels
from cait_jax.augment.pipeline import Augmentation, augment, normalise, random_erase
from cait_jax.train.average import moving_average
from cait_jax.train.distill import both_heads
from cait_jax.train.losses import correct
from cait_jax.train.parts import apply_updates, stop_frozen
from cait_jax.train.sam import sharpness_aware
from cait_jax.train.state import TrainState

Batch = dict[str, Array]
Metrics = dict[str, Array]
TrainStep = Callable[..., tuple[TrainState, Metrics]]
LabelLoss = Callable[[Any, Any], Any]
TeacherLoss = Callable[[Any, Any, Any], Any]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs beside the state and the batch.

    Attributes:
      label_loss: from logits and soft targets, both (batch, classes), to the loss of each example.
      teacher_loss: from the label's loss, logits and the teacher's logits to the loss of each example; None
        without a teacher.
      seed: of the run; each step's keys are folded from it and the step.
      mean: of each channel, on a scale from 0 to 1.
      std: likewise.
      augmentation: what is drawn for each image.
      erase: probability that a box of an image is erased.
      label_smoothing: the share of a label spread evenly over all classes.
      mixing: how images are mixed with each other, and their labels with them.
      trainable: from parameters and step to marks of what learns, see `cait_jax.train.parts`; None: all does.
      sharpness_radius: rho of sharpness-aware minimisation; 0 for none.
      accumulate: micro batches a step, their gradients averaged.
      ema_decay: of the average of the parameters; 0 for none.
    """

    label_loss: LabelLoss
    teacher_loss: TeacherLoss | None = None
    seed: int = 0
    mean: tuple[float, ...] = (0.5,)
    std: tuple[float, ...] = (0.5,)
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)
    erase: float = 0.0
    label_smoothing: float = 0.0
    mixing: Mixup = dataclasses.field(default_factory=Mixup)
    trainable: Callable[[Any, Any], Any] | None = None
    sharpness_radius: float = 0.0
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
      A function of a state, a batch (`image` uint8 (batch, height, width, channels), `label` int32
      (batch,); a teacher's recorded logits as `teacher` (batch, classes)) and a teacher (of `make_teacher`,
      or None), which gives the next state and the scalars `loss`
      (mean, nats), `accuracy` (0 to 1, against the larger part of a mixed label), `learning_rate` (as
      applied in this step) and `grad_norm` (before clipping). Not yet jitted.
    """

    def prepared(batch: Batch, keys: dict[str, Array]) -> Batch:
        """What the model sees of a global batch: its images are mixed with each other."""
        ids = jnp.arange(batch["label"].shape[0])
        images = batch["image"].astype(jnp.float32)
        images = augment(keys["augment"], images, ids, recipe.augmentation)
        images = normalise(images, recipe.mean, recipe.std)
        images = random_erase(keys["erase"], images, ids, recipe.erase)
        targets = soft_labels(batch["label"], model.num_classes, recipe.label_smoothing)
        mixed, targets = mix(keys["mix"], images, targets, recipe.mixing)
        seen = {"image": mixed, "target": targets, "id": ids}
        if "teacher" in batch:  # who saw the images one by one: what it would say of two is both
            says = jax.nn.softmax(batch["teacher"].astype(jnp.float32))
            _, says = mix(keys["mix"], images, says, recipe.mixing)
            seen["teacher"] = jnp.log(jnp.maximum(says, jnp.finfo(says.dtype).tiny))
        return seen

    def heads(params: Any, batch: Batch, keys: dict[str, Array]) -> tuple[Any, Any]:
        """Logits for the label, and logits for the teacher: the same unless the network has two heads."""
        options: dict[str, Any] = {
            "train": True,
            "example_ids": batch["id"],
            "rngs": {"dropout": keys["dropout"], "drop_path": keys["drop_path"]},
        }
        if recipe.teacher_loss is not None and model.distilled:
            return both_heads(model, {"params": params}, batch["image"], **options)
        logits: Any = model.apply({"params": params}, batch["image"], **options)
        return logits, logits

    def train_step(
        state: TrainState, batch: Batch, teacher: Any = None
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
        names = ("augment", "dropout", "drop_path", "erase", "mix")
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
        learns = recipe.trainable and recipe.trainable(state.params, state.step)

        def loss_and_accuracy(params: Any, micro: Batch) -> Any:
            if learns is not None:
                params = stop_frozen(params, learns)
            for_label, for_teacher = heads(params, micro, keys)
            losses = recipe.label_loss(for_label, micro["target"])
            if recipe.teacher_loss is not None:
                says = micro["teacher"] if "teacher" in micro else teacher(micro["image"])
                losses = recipe.teacher_loss(losses, for_teacher, says)
            label = jnp.argmax(micro["target"], axis=-1)
            return losses.mean(), correct(for_label, label).mean()

        gradient_of = jax.value_and_grad(loss_and_accuracy, has_aux=True)
        whole = prepared(batch, keys)

        def batch_sharding(params: Any) -> Any:
            return mean_over_micro_batches(
                lambda micro: gradient_of(params, micro), whole, recipe.accumulate
            )

        (loss, accuracy), gradient = sharpness_aware(batch_sharding, recipe.sharpness_radius)(
            state.params
        )
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = apply_updates(state.params, updates)
        ema = state.ema
        if recipe.ema_decay:
            ema = moving_average(ema, params, recipe.ema_decay)
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
