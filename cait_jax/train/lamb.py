"""LAMB (You et al., arXiv 1904.00962) as timm's `Lamb` has it."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax


def lamb(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float | optax.Schedule,
    mask: Any,
) -> optax.GradientTransformation:
    """`optax.lamb` with a trust ratio only where weights decay, and one for each slice of stacked blocks.

    Everything else takes Adam's step; without weight decay so does every array. A ratio for every array would hold
    back LayerScale: the norm of its gammas starts near 0.
    """
    return optax.chain(
        _scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(_vmap_over_blocks(optax.scale_by_trust_ratio()), mask)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with an exact bias correction.

    In float32 its `1 - b2**count` is off by 1e-5 in the first steps, in the same direction for all of them.
    """

    def corrected(moments: Any, decay: float, count: Any) -> Any:
        correction = -jnp.expm1(count * math.log(decay)) if decay else jnp.ones(())
        return jax.tree.map(lambda moment: moment / correction.astype(moment.dtype), moments)

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            jnp.zeros((), jnp.int32), optax.tree.zeros_like(params), optax.tree.zeros_like(params)
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        mu = optax.tree.update_moment(updates, state.mu, b1, 1)
        nu = optax.tree.update_moment_per_elem_norm(updates, state.nu, b2, 2)
        count = optax.safe_increment(state.count)
        scaled = jax.tree.map(
            lambda m, v: m / (jnp.sqrt(v) + eps), corrected(mu, b1, count), corrected(nu, b2, count)
        )
        return scaled, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformation(init, update)


def _vmap_over_blocks(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a stateless transformation to each slice of stacked blocks."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def apply(of_updates: Any, of_params: Any) -> Any:
            return stateless.update(of_updates, state, of_params)[0]

        parts = {
            part: (jax.vmap(apply) if part == "blocks" else apply)(updates[part], params[part])
            for part in updates
        }
        return parts, state

    return optax.GradientTransformation(stateless.init, update)
