"""Supervised training: labels, mixed into soft targets, with or without a teacher."""

import functools
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from cait_jax.augment import mixup, pipeline
from cait_jax.augment.pipeline import Augmentation
from cait_jax.data.split import Split
from cait_jax.errors import UserError, setting
from cait_jax.evaluation.evaluate import (
    evaluate,
    jit_eval_step,
    loss_and_accuracy,
    make_eval_step,
    means,
    zero_sums,
)
from cait_jax.models.variants import VARIANTS
from cait_jax.models.zoo import create_model
from cait_jax.sharding import batch_sharding, positions
from cait_jax.train.step import Aux, Batch, Evaluate, Keys, Params, training_options

Logits = Float[Array, "batch classes"]
Targets = Float[Array, "batch classes"]


@struct.dataclass
class Supervised:
    """The objective. A batch has `image` uint8 (batch, h, w, channels), `label` int32 (batch,), and `teacher`.

    `teacher` holds logits (batch, classes) that were recorded for the unmixed images, where
    `config.distill.logits` names a file of them.

    Attributes:
      model: applied as `model.apply(variables, images, train=True, example_ids=..., rngs=...)`.
      label_loss: from logits and soft targets to the loss of each example.
      mean: of each channel, as `std` on a scale from 0 to 1.
      augmentation: what is drawn for each image.
      reprob: probability of random erasing.
      smoothing: of labels.
      mixing: mixup and CutMix.
      teacher_loss: from the label's loss, logits and teacher logits to the loss of each example; None: no teacher.
      teacher: from images to logits; None where they are recorded.
    """

    model: Any = struct.field(pytree_node=False)
    label_loss: Callable[..., Array] = struct.field(pytree_node=False)
    mean: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    std: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    augmentation: Augmentation = struct.field(pytree_node=False, default=Augmentation())
    reprob: float = struct.field(pytree_node=False, default=0.0)
    smoothing: float = struct.field(pytree_node=False, default=0.0)
    mixing: mixup.Mixup = struct.field(pytree_node=False, default=mixup.Mixup())
    teacher_loss: Callable[..., Array] | None = struct.field(pytree_node=False, default=None)
    teacher: Any = None

    rngs: ClassVar[tuple[str, ...]] = ("augment", "dropout", "drop_path", "erase", "mix")

    def init(self, key: Array, images: Array, params: Params = None) -> tuple[Params, Any]:
        """The network's parameters, unless they are given; nothing is carried."""
        return self.model.init(key, images)["params"] if params is None else params, {}

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Augments, normalises, erases and mixes images; targets and teacher logits are mixed by the same draw."""
        ids = positions(batch["label"])
        images = batch["image"].astype(jnp.float32)
        images = pipeline.augment(keys["augment"], images, ids, self.augmentation)
        images = pipeline.normalise(images, self.mean, self.std)
        images = pipeline.random_erase(keys["erase"], images, ids, self.reprob)
        targets = mixup.soft_labels(batch["label"], self.model.num_classes, self.smoothing)
        mixed, targets = mixup.mix(keys["mix"], images, targets, self.mixing)
        prepared = {"image": mixed, "target": targets, "id": ids}
        if "teacher" in batch:  # of unmixed images: the mixture of the probabilities
            probabilities = jax.nn.softmax(batch["teacher"].astype(jnp.float32))
            _, probabilities = mixup.mix(keys["mix"], images, probabilities, self.mixing)
            tiny = np.finfo(np.float32).tiny
            prepared["teacher"] = jnp.log(jnp.maximum(probabilities, tiny))
        return prepared

    def loss(
        self, params: Params, carried: Any, batch: Batch, keys: Keys, step: Array
    ) -> tuple[Array, Aux]:
        """The mean loss in nats, and accuracy (0 to 1) against the largest part of a mixed label."""
        del carried, step
        options = training_options(keys, batch["id"])
        if self.teacher_loss is None:
            logits = self.model.apply({"params": params}, batch["image"], **options)
            losses = self.label_loss(logits, batch["target"])
        else:
            from cait_jax.train.objectives.distillation import logits_and_losses

            logits, losses = logits_and_losses(self, params, batch, options)
        label = jnp.argmax(batch["target"], axis=-1)
        return losses.mean(), {"metrics": {"accuracy": correct(logits, label).mean()}}

    def update(self, carried: Any, params: Params, aux: Aux, step: Array) -> Any:
        """Nothing is carried."""
        del params, aux, step
        return carried

    def evaluator(self, mesh: Mesh) -> Evaluate:
        """`loss` (mean, nats) and `accuracy` (0 to 1) on the evaluation split."""
        step = jit_eval_step(
            make_eval_step(self.model, self.mean, self.std, loss_and_accuracy), mesh
        )
        zeros = zero_sums(loss_and_accuracy, self.model.num_classes)

        def eval_step(params: Any, batch: Any, sums: Any) -> Any:
            return {name: step({"params": p}, batch, sums[name]) for name, p in params.items()}

        def run(params: Any, batches: Any, progress: Any = None) -> dict[str, dict[str, float]]:
            start = dict.fromkeys(params, zeros)
            sums = evaluate(eval_step, params, batches, batch_sharding(mesh), start, progress)
            return {name: means(sums[name]) for name in params}

        return run


def from_config(
    config: ConfigDict, split: Split, teacher: Callable[..., Any] | None = None
) -> Supervised:
    """The objective of a config for a training split.

    `teacher` is from config and model to the teacher; by default it has the weights that the config names.

    Raises:
      UserError: for a network that cannot be trained, or a teacher that does not fit.
    """
    name = config.model.name
    if name in VARIANTS and VARIANTS[name].family == "RegNetY":
        raise UserError(
            f"{setting('config.model.name', name)} is here to teach and to predict, not to be trained: its batch "
            "norms keep running averages; choose a transformer, such as cait_xxs24 or deit_small"
        )
    model: Any = create_model(
        image_size=config.image_size,
        num_classes=split.num_classes,
        in_channels=split.channels,
        **config.model,
    )
    teacher_loss = found = None
    if config.distill.kind != "none":
        from cait_jax.train.objectives import distillation

        teacher_loss = distillation.loss_from_config(config)
        distillation.check_teacher_classes(config, split.class_names)
        found = (teacher or distillation.teacher_from_config)(config, model)
    return Supervised(
        model=model,
        label_loss=loss_from_config(config),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augmentation=pipeline.from_config(config),
        reprob=config.augment.reprob,
        smoothing=config.loss.smoothing,
        mixing=mixup.from_config(config),
        teacher_loss=teacher_loss,
        teacher=found,
    )


def loss_from_config(config: ConfigDict) -> Callable[..., Array]:
    """The loss against labels: `"softmax"` for `cross_entropy`, or `"binary"`.

    Raises:
      UserError: a threshold without `"binary"`.
    """
    if config.loss.name == "binary":
        return functools.partial(binary_cross_entropy, threshold=config.loss.target_threshold)
    if config.loss.target_threshold is not None:
        raise UserError(
            f"{setting('config.loss.target_threshold')} goes with {setting('config.loss.name', 'binary')}, "
            "not softmax"
        )
    return cross_entropy


def cross_entropy(logits: Logits, targets: Targets) -> Float[Array, "batch"]:
    """Softmax cross-entropy in nats against distributions over classes, such as smoothed or mixed labels."""
    losses: Array = optax.softmax_cross_entropy(logits, targets)
    return losses


def binary_cross_entropy(
    logits: Logits, targets: Targets, threshold: float | None = None, sum_classes: bool = False
) -> Float[Array, "batch"]:
    """Binary cross-entropy of each class, in nats (Wightman et al., arXiv 2110.00476).

    Args:
      logits: log odds of each class.
      targets: from 0 to 1, smoothed or mixed; rows need not sum to 1.
      threshold: targets above it become 1 and all others 0, so that each image mixed in counts fully.
      sum_classes: sum over classes instead of averaging, which is what timm's `BinaryCrossEntropy` does.
    """
    if threshold is not None:
        targets = (targets > threshold).astype(logits.dtype)
    losses: Array = optax.sigmoid_binary_cross_entropy(logits, targets)
    return losses.sum(axis=-1) if sum_classes else losses.mean(axis=-1)


def correct(logits: Logits, labels: Int[Array, "batch"]) -> Float[Array, "batch"]:
    """1 where the largest logit is the label's, else 0."""
    return (jnp.argmax(logits, axis=-1) == labels).astype(jnp.float32)
