"""Attention whose heads are mixed, computed in several ways, and what the kernels of TPUs and GPUs share."""

from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.kernels.talking_heads import (
    DEFAULT_ATTENTION,
    IMPLEMENTATIONS,
    SMALL_MAPS,
    talking_heads_attention,
)

__all__ = ["DEFAULT_ATTENTION", "IMPLEMENTATIONS", "SMALL_MAPS", "talking_heads_attention"]

HIDDEN = -1e30  # a logit whose softmax is 0, and whose difference to another is still a number


def dot(x: Any, y: Any, contract: tuple[int, int], precision: Any) -> Any:
    """Matmul of two matrices over an axis of each, accumulated in float32."""
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        x, y, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def mixture(weight: Any, maps: list[Any], to: int, *, transposed: bool = False) -> Any:
    """Sum over heads of their maps, weighted by a column of the weight, or by a row."""
    total = None
    for head, each in enumerate(maps):
        term = (weight[to, head] if transposed else weight[head, to]) * each
        total = term if total is None else total + term
    return total
