"""The encoder of a run that learnt without labels, as the start of a classifier."""

import logging
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.errors import UserError
from cait_jax.weights.adapt import adapt_input
from cait_jax.weights.runs import read_encoder
from cait_jax.weights.state_dicts import check_finite
from cait_jax.weights.timm_names import from_timm, to_timm

_log = logging.getLogger(__name__)


def params_from_encoder(path: Path, model: Any, *, ema: bool = False, seed: int = 0) -> Any:
    """A classifier's parameters: those before its class attention, last norm and head from a run of MAE.

    The others are initialised from the seed. One log line names them, and what of the run is left out.

    Args:
      path: the run's workdir, or one of its checkpoints.
      model: the classifier; position embedding and patch kernel are resized to it.
      ema: take the average of the run's parameters.
      seed: of the initialisation.

    Raises:
      UserError: an encoder's parameter is missing, left over or of another shape, or the run has no average.
    """
    image_size, encoder, dropped = read_encoder(path, ema=ema)

    def init(key: Any, **options: Any) -> Any:
        images = jnp.zeros((1, *model.image_size, model.in_channels), jnp.float32)
        return model.init(key, images, **options)["params"]

    shared = jax.eval_shape(
        lambda: init(jax.random.key(seed), visible=jnp.zeros((1, 1), jnp.int32))
    )
    initial = jax.jit(init)(jax.random.key(seed))
    fresh = {name: leaves for name, leaves in initial.items() if name not in shared}
    weights = to_timm({"params": {**encoder, **fresh}})
    try:
        weights = adapt_input(weights, model, image_size=image_size)
        check_finite(weights, model.param_dtype)
        params = from_timm(weights, model)["params"]
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    _log.warning(
        "took the encoder of %s; dropped its %s; initialised from seed %d: %s",
        path, ", ".join(sorted(dropped)), seed, ", ".join(sorted(fresh)),
    )  # fmt: skip
    return params
