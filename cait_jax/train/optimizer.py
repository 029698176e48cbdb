"""The weight-decay mask and the optimisers by name."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cait_jax.errors import UserError, nearest


def decay_mask(params: Any) -> Any:
    """Marks what weight decay applies to: kernels, by name.

    Not `cls_token`, `pos_embed`, any bias, any norm parameter or any LayerScale gamma. The rank of an array
    would not tell: in stacked blocks every parameter has one axis more.

    Args:
      params: a parameter tree.

    Returns:
      The same tree with True where weights decay.
    """
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(
    schedule: optax.Schedule,
    *,
    name: str = "adamw",
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float | None = None,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.05,
    clip_norm: float | None = None,
) -> optax.GradientTransformation:
    """An optimiser with decay by name and optional clipping.

    A step is the same for stacked and for single blocks.

    Args:
      schedule: step to learning rate.
      name: one of `OPTIMIZERS`: `"adamw"` (Loshchilov and Hutter, arXiv 1711.05101), the paper's; `"lamb"`
        (You et al., arXiv 1904.00962) as timm's `Lamb` has it: only what decays is scaled by its trust ratio,
        everything else takes Adam's step, and without weight decay so does every array; `"lion"` (Chen et
        al., arXiv 2302.06675); `"sgd"` with momentum.
      b1: decay of the first moment; of Lion what its step takes of the old moment. Not for SGD.
      b2: decay of the second moment; Lion's decay of its only one, usually 0.99. Not for SGD.
      eps: added to the root of the second moment, of AdamW and LAMB; None: 1e-8, of LAMB 1e-6 (timm's default).
      momentum: of SGD; 0 for none.
      nesterov: of SGD: look ahead along the momentum.
      weight_decay: of kernels. Decoupled and multiplied by the learning rate; of SGD a part of the gradient
        (L2), as the paper's transfers have it.
      clip_norm: largest global norm of the gradient; 0: no clipping; None: no clipping, of LAMB 1 (timm's
        default).

    Returns:
      The transformation; it needs the parameters in `update`.

    Raises:
      UserError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"there is no optimizer {name!r}; {nearest(name, OPTIMIZERS)}")
    if eps is None:
        eps = 1e-6 if name == "lamb" else 1e-8
    if clip_norm is None:
        clip_norm = 1.0 if name == "lamb" else 0.0
    adaptive = {"b1": b1, "b2": b2, "weight_decay": weight_decay}
    options: dict[str, Any] = {
        "adamw": {**adaptive, "eps": eps},
        "lamb": {**adaptive, "eps": eps},
        "lion": adaptive,
        "sgd": {"momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay},
    }[name]
    optimizer = OPTIMIZERS[name](schedule, mask=decay_mask, **options)
    return optax.chain(optax.clip_by_global_norm(clip_norm), optimizer) if clip_norm else optimizer


def _sgd(
    schedule: optax.Schedule, *, momentum: float, nesterov: bool, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    return optax.chain(
        optax.add_decayed_weights(weight_decay, mask),
        optax.sgd(schedule, momentum=momentum or None, nesterov=nesterov),
    )


def _lamb(
    schedule: optax.Schedule, *, b1: float, b2: float, eps: float, weight_decay: float, mask: Any
) -> optax.GradientTransformation:
    """`optax.lamb` with the trust ratio only where weights decay, and one ratio for each stacked block.

    A ratio for every array would hold back LayerScale: the norm of its gammas starts near 0.
    """
    return optax.chain(
        _scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        optax.masked(_by_block(optax.scale_by_trust_ratio()), mask)
        if weight_decay
        else optax.identity(),
        optax.scale_by_learning_rate(schedule),
    )


def _scale_by_adam(*, b1: float, b2: float, eps: float) -> optax.GradientTransformation:
    """`optax.scale_by_adam` with an exact bias correction.

    In float32 its `1 - b2**count` is off by 1e-5 in the first steps, and all of them err in the same direction.
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


def _by_block(stateless: optax.GradientTransformation) -> optax.GradientTransformation:
    """Applies a transformation without state to each slice of stacked blocks on its own."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        def apply(of_updates: Any, of_params: Any) -> Any:
            return stateless.update(of_updates, state, of_params)[0]

        parts = {
            part: (jax.vmap(apply) if part == "blocks" else apply)(updates[part], params[part])
            for part in updates
        }
        return parts, state

    return optax.GradientTransformation(stateless.init, update)


OPTIMIZERS: Mapping[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.adamw,
    "lamb": _lamb,
    "lion": optax.lion,
    "sgd": _sgd,
}
