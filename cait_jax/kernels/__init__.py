"""Attention whose heads are mixed, computed in several ways."""

from cait_jax.kernels.talking_heads import IMPLEMENTATIONS, talking_heads_attention

__all__ = ["IMPLEMENTATIONS", "talking_heads_attention"]
