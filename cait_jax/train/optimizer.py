"""The learning-rate schedule, the weight-decay mask and the Optax chain of the paper's recipe."""

from typing import Any

import jax
import optax


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
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    clip_norm: float = 0.0,
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101) with decay by name and optional clipping.

    Args:
      schedule: step to learning rate.
      b1: decay of the first moment.
      b2: decay of the second moment.
      eps: added to the root of the second moment.
      weight_decay: decoupled, multiplied by the learning rate.
      clip_norm: largest global norm of the gradient; 0 for none.

    Returns:
      The transformation.
    """
    adamw = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decay_mask)
    return optax.chain(optax.clip_by_global_norm(clip_norm), adamw) if clip_norm else adamw
