"""The learning-rate schedule, the weight-decay mask and the optimisers by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import optax

from cait_jax.errors import UserError, nearest


def learning_rate_schedule(
    *,
    peak: float,
    total_steps: int,
    warmup_steps: int,
    warmup_from: float = 1e-6,
    final: float = 1e-5,
) -> optax.Schedule:
    """Linear warm-up, then a cosine to `final` (DeiT's recipe, arXiv 2012.12877, table 9).

    Args:
      peak: learning rate at the end of the warm-up.
      total_steps: steps of the whole run, the warm-up among them; the rate of a step is that of its start,
        so the last step runs a little above `final`.
      warmup_steps: steps of the warm-up. Where it is longer than the run, the run ends inside it.
      warmup_from: learning rate of step 0.
      final: learning rate that the cosine reaches at `total_steps`.

    Returns:
      Step to learning rate.
    """
    cosine = optax.cosine_decay_schedule(
        peak, max(total_steps - warmup_steps, 1), alpha=final / peak if peak else 0.0
    )
    if warmup_steps == 0:
        return cosine
    warmup = optax.linear_schedule(warmup_from, peak, warmup_steps)
    return optax.join_schedules([warmup, cosine], [warmup_steps])


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
    eps: float = 1e-8,
    momentum: float = 0.9,
    nesterov: bool = False,
    weight_decay: float = 0.05,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """An optimiser with decay by name and optional clipping.

    A step is the same for stacked and for single blocks.

    Args:
      schedule: step to learning rate.
      name: one of `OPTIMIZERS`: `"adamw"` (Loshchilov and Hutter, arXiv 1711.05101), the paper's; `"lamb"` (You et
        al., arXiv 1904.00962); `"lion"` (Chen et al., arXiv 2302.06675); `"sgd"` with momentum.
      b1: decay of the first moment; of Lion what its step takes of the old moment. Not for SGD.
      b2: decay of the second moment; Lion's decay of its only one, usually 0.99. Not for SGD.
      eps: added to the root of the second moment, of AdamW and LAMB; LAMB usually has 1e-6.
      momentum: of SGD; 0 for none.
      nesterov: of SGD: look ahead along the momentum.
      weight_decay: of kernels. Decoupled and multiplied by the learning rate; of SGD a part of the gradient
        (L2), as the paper's transfers have it.
      clip_norm: largest global norm of the gradient; 0 for none.

    Returns:
      The transformation; it needs the parameters in `update`.

    Raises:
      UserError: for an unknown name.
    """
    if name not in OPTIMIZERS:
        raise UserError(f"there is no optimizer {name!r}; {nearest(name, OPTIMIZERS)}")
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
    """`optax.lamb`, whose ratio of norms is that of an array, with one ratio for each stacked block."""
    return optax.chain(
        optax.scale_by_adam(b1=b1, b2=b2, eps=eps),
        optax.add_decayed_weights(weight_decay, mask),
        _by_block(optax.scale_by_trust_ratio()),
        optax.scale_by_learning_rate(schedule),
    )


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
