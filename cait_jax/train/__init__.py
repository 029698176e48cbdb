"""Training: one loop, and the pure functions plugged into it."""

from cait_jax.train.loop import NonFiniteError, Run, train

__all__ = ["NonFiniteError", "Run", "train"]
