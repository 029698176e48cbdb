"""Training: one loop, and the pure functions plugged into it."""

from cait_jax.train.loop import Run, train
from cait_jax.train.nonfinite import NonFiniteError

__all__ = ["NonFiniteError", "Run", "train"]
