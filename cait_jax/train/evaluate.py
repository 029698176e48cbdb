"""Exact evaluation: every example counts once, whatever the batch size and the number of devices."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import NamedSharding
from jaxtyping import Array

from cait_jax.data.augment import normalise
from cait_jax.train.losses import correct, cross_entropy
from cait_jax.sharding import put_batch

EvalStep = Callable[[Any, dict[str, Array], dict[str, Array]], dict[str, Array]]


def make_eval_step(model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> EvalStep:
    """Builds the function that adds one batch to running sums. Not yet jitted.

    Args:
      model: applied as `model.apply(variables, images)`.
      mean: of each channel, on a scale from 0 to 1.
      std: likewise.

    Returns:
      A function of parameters, a batch (`image` uint8, `label` int32, `mask` bool) and the sums so far, which
      gives the sums `loss`, `correct` and `count` with the batch's unmasked examples added.
    """

    def eval_step(params: Any, batch: dict[str, Array], sums: dict[str, Array]) -> dict[str, Array]:
        images = normalise(batch["image"], mean, std)
        logits: Any = model.apply({"params": params}, images)
        values = {
            "loss": cross_entropy(logits, batch["label"]),
            "correct": correct(logits, batch["label"]),
            "count": jnp.ones_like(batch["label"], jnp.float32),
        }
        return {
            name: sums[name] + jnp.where(batch["mask"], value, 0).sum()
            for name, value in values.items()
        }

    return eval_step


def evaluate(
    eval_step: EvalStep,
    params: Any,
    batches: Iterable[dict[str, np.ndarray]],
    sharding: NamedSharding,
) -> dict[str, float]:
    """Evaluates parameters on a split.

    The sums stay on the device until the last batch and are divided once.

    Args:
      eval_step: of `make_eval_step`, jitted.
      params: parameters.
      batches: of `cait_jax.data.pipeline.eval_batches`.
      sharding: how a batch lies on the devices.

    Returns:
      `loss` (mean cross-entropy in nats) and `accuracy` (0 to 1).
    """
    sums: dict[str, Any] = {name: np.zeros((), np.float32) for name in ("loss", "correct", "count")}
    for batch in batches:
        sums = eval_step(params, put_batch(batch, sharding), sums)
    total = {name: float(value) for name, value in jax.device_get(sums).items()}
    return {
        "loss": total["loss"] / total["count"],
        "accuracy": total["correct"] / total["count"],
    }
