"""What a training step takes and gives back."""

from typing import Any

import jax.numpy as jnp
import optax
from flax import struct


@struct.dataclass
class TrainState:
    """The whole state of a run: what a checkpoint holds. Leaves are arrays, or their shapes and dtypes.

    Attributes:
      step: steps taken, an int32 scalar.
      params: parameters.
      opt_state: state of the Optax chain.
      ema: exponential moving average of the parameters, or an empty dict where none is kept.
    """

    step: Any
    params: Any
    opt_state: Any
    ema: Any


def create_state(params: Any, optimizer: optax.GradientTransformation, ema: bool) -> TrainState:
    """The state before the first step.

    Args:
      params: initial parameters; the average starts from them too.
      optimizer: the Optax chain.
      ema: whether to keep an average.
    """
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if ema else {},
    )
