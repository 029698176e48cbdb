"""Attention whose heads are mixed, computed in several ways."""

from cait_jax.kernels.talking_heads import (
    IMPLEMENTATIONS,
    default_implementation,
    talking_heads_attention,
)

__all__ = ["IMPLEMENTATIONS", "default_implementation", "talking_heads_attention"]
