"""Exact evaluation: every example counts once, whatever the batch size and the number of devices.

A metric function of logits and a batch gives sums over the examples that count. The sums of all batches are added
on the devices and divided at the end, so they do not depend on how a split was cut into batches.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, Int, Num

from cait_jax.augment.pipeline import normalise
from cait_jax.errors import UserError
from cait_jax.sharding import batch_sharding, constrain_batch, put_batch, replicated

Batch = Mapping[str, Any]
Sums = Any  # a pytree of arrays
MetricFn = Callable[[Array, Batch], Sums]
EvalStep = Callable[[Any, Batch, Sums], Sums]
Logits = Float[Array, "batch classes"]
Labels = Int[Array, "batch"]


def make_eval_step(
    model: Any, mean: tuple[float, ...], std: tuple[float, ...], metric_fn: MetricFn
) -> EvalStep:
    """Builds the function that adds one batch to running sums. Not jitted.

    A batch has `image` uint8 (batch, height, width, channels), `mask` bool (batch,), False for padding, and what
    `metric_fn` reads. Images are normalised by `mean` and `std`, on a scale from 0 to 1.
    """

    def eval_step(variables: Any, batch: Batch, sums: Sums) -> Sums:
        logits = model.apply(variables, normalise(batch["image"], mean, std))
        return jax.tree.map(jnp.add, sums, metric_fn(logits, batch))

    return eval_step


def jit_eval_step(eval_step: EvalStep, mesh: Mesh) -> EvalStep:
    """Jits an evaluation step: the batch sharded, the sums replicated, variables with the sharding they have."""
    return jax.jit(
        constrain_batch(eval_step, mesh),
        in_shardings=(None, batch_sharding(mesh), replicated(mesh)),
        out_shardings=replicated(mesh),
    )


def evaluate(
    eval_step: EvalStep,
    variables: Any,
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: NamedSharding,
    zeros: Sums,
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Folds `sums = eval_step(variables, batch, sums)` over the batches of a split, beginning with `zeros`.

    After each batch `progress` is called with the number of this process's examples in it, without padding.

    Returns:
      The sums over all examples of all processes, as NumPy arrays.
    """
    # Sharded as the step's results, so that the first call compiles for all.
    sums = finished = jax.device_put(zeros, replicated(sharding.mesh))
    for batch in batches:
        sums = eval_step(variables, put_batch(batch, sharding), sums)
        # One batch is transferred while the one before is computed; no more, or they would fill the devices.
        jax.block_until_ready(finished)
        finished = sums
        if progress is not None:
            progress(int(batch["mask"].sum()))
    return jax.device_get(sums)


def loss_and_accuracy(logits: Logits, batch: Batch) -> dict[str, Num[Array, ""]]:
    """Metric function of the training loop: sums `counted` (labels of 0 or more), `loss` (nats) and `top1`.

    Logits that are not finite are never right.
    """
    label = batch["label"]
    counted = batch["mask"] & (label >= 0)
    losses = cross_entropy(jax.nn.log_softmax(logits.astype(jnp.float32)), label)
    right = (jnp.argmax(logits, axis=-1) == label) & ~jnp.isnan(losses)
    return {
        "counted": counted.sum(),
        "loss": jnp.where(counted, losses, 0.0).sum(),
        "top1": (counted & right).sum(),
    }


def cross_entropy(log_probabilities: Logits, label: Labels) -> Float[Array, "batch"]:
    """NaN exactly where the logits are not finite; arbitrary where the label is below 0."""
    own = jnp.take_along_axis(log_probabilities, jnp.maximum(label, 0)[:, None], axis=-1)
    return -own[:, 0]


def means(sums: Mapping[str, Any]) -> dict[str, float]:
    """`loss` (mean, nats) and `accuracy` (0 to 1) from the sums of `loss_and_accuracy`."""
    count = int(sums["counted"])
    if not count:
        raise UserError("no image of the split has a label; choose a split with labels")
    return {"loss": float(sums["loss"]) / count, "accuracy": int(sums["top1"]) / count}


def zero_sums(metric_fn: MetricFn, num_classes: int) -> Any:
    """NumPy zeros of the shapes and dtypes that `metric_fn` gives for logits of `num_classes`."""
    batch = {
        "label": jax.ShapeDtypeStruct((1,), jnp.int32),
        "labels": jax.ShapeDtypeStruct((1, num_classes), jnp.bool_),
        "mask": jax.ShapeDtypeStruct((1,), jnp.bool_),
    }
    sums = jax.eval_shape(metric_fn, jax.ShapeDtypeStruct((1, num_classes), jnp.float32), batch)
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), sums)
