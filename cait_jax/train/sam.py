"""Sharpness-aware minimisation (Foret et al., arXiv 2010.01412)."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

# As of `jax.value_and_grad`: from parameters and anything else to (value, gradient).
GradientOf = Callable[..., tuple[Any, Any]]


def sharpness_aware(gradient_of: GradientOf, rho: float) -> GradientOf:
    """Takes the gradient where the loss nearby is (about) highest, instead of at the parameters.

    That place is `params + rho * g / ||g||` with the gradient g at the parameters and one norm over all of
    them (equation 2 with p = 2; algorithm 1). The second gradient is of the same batch and the same draws,
    since all other arguments are the same. It costs a second forward and backward pass.

    Args:
      gradient_of: as `jax.value_and_grad` gives it, with or without auxiliary values. Around the mean over
        micro batches, not inside it, the result does not depend on their number.
      rho: how far away, as a norm; 0.05 in the paper. 0 gives back `gradient_of`.

    Returns:
      A function of the same arguments: the value at the parameters, the gradient nearby.
    """
    if rho == 0:
        return gradient_of

    def wrapped(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        value, gradient = gradient_of(params, *args, **kwargs)
        norm = optax.tree.norm(gradient)
        scale = rho / jnp.where(norm > 0, norm, jnp.ones_like(norm))
        nearby = jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, gradient)
        _, gradient = gradient_of(nearby, *args, **kwargs)
        return value, gradient

    return wrapped
