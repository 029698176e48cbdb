"""Exact evaluation: every example counts once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from cait_jax.augment.pipeline import normalise
from cait_jax.evaluation.metrics import Batch, Measure, Sums
from cait_jax.sharding import batch_sharding, constrain_batch, put_batch, replicated

EvalStep = Callable[[Any, Batch, Sums], Sums]


def make_eval_step(
    model: Any, mean: tuple[float, ...], std: tuple[float, ...], measure: Measure
) -> EvalStep:
    """Builds the function that adds one batch to running sums. Not yet jitted.

    Args:
      model: applied as `model.apply(variables, images)`, which gives logits.
      mean: of each channel, on a scale from 0 to 1.
      std: likewise.
      measure: what is summed, see `cait_jax.evaluation.metrics`.

    Returns:
      A function of variables, a batch (`image` uint8, `mask` bool and what `measure` reads) and the sums so
      far, which gives the sums with the batch's added.
    """

    def eval_step(variables: Any, batch: Batch, sums: Sums) -> Sums:
        logits = model.apply(variables, normalise(batch["image"], mean, std))
        return jax.tree.map(jnp.add, sums, measure(logits, batch))

    return eval_step


def jit_eval_step(eval_step: EvalStep, mesh: Mesh) -> EvalStep:
    """Jits an evaluation step: the batch divided over the devices, sums on each, variables as they lie."""
    whole, rows = replicated(mesh), batch_sharding(mesh)
    return jax.jit(
        constrain_batch(eval_step, mesh), in_shardings=(None, rows, whole), out_shardings=whole
    )


def evaluate(
    eval_step: EvalStep,
    variables: Mapping[str, Any],
    batches: Iterable[Mapping[str, np.ndarray]],
    sharding: NamedSharding,
    zeros: Sums,
    progress: Callable[[int], object] | None = None,
) -> Any:
    """Sums a measure over a split.

    The sums stay on the devices until the last batch. One batch is on its way while the one before is computed.

    Args:
      eval_step: of `make_eval_step`, jitted.
      variables: `{"params": ...}`, and what else the model needs.
      batches: of `cait_jax.data.eval_batches`.
      sharding: how a batch lies on the devices.
      zeros: the sums of no examples, see `cait_jax.evaluation.metrics.zero_sums`.
      progress: called after each batch with the number of this process's examples in it, padding left out.

    Returns:
      The sums over all examples of all processes, as NumPy arrays.
    """
    # Placed as the step gives them, so that the first call compiles for all.
    sums = finished = jax.device_put(zeros, NamedSharding(sharding.mesh, PartitionSpec()))
    for batch in batches:
        sums = eval_step(variables, put_batch(batch, sharding), sums)
        # Else a fast reader would fill the devices with batches that wait.
        jax.block_until_ready(finished)
        finished = sums
        if progress is not None:
            progress(int(batch["mask"].sum()))
    return jax.device_get(sums)
