"""Muon (Jordan et al., 2024), scaled as in Liu et al., arXiv 2502.16982: the matrices of the blocks take
orthogonalised steps, all else takes Adam's."""

import math
from typing import Any

import jax
import optax
from jaxtyping import PyTree
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from cait_jax.models.lora import LAYERS

_MATRIX = MuonDimensionNumbers(-2, -1)
_RMS = 0.2  # of AdamW's steps, so that its learning rate and weight decay hold (arXiv 2502.16982, section 2.2)


def muon(
    schedule: optax.Schedule,
    *,
    b1: float,
    b2: float,
    eps: float,
    weight_decay: float | optax.Schedule,
    mask: Any,
) -> optax.GradientTransformation:
    """Optax's `scale_by_muon` (Nesterov momentum of 0.95, five steps of Newton and Schulz) beside Adam.

    Stacked blocks are taken apart. An m x n matrix steps by the learning rate times 0.2 sqrt(max(m, n)).

    Args:
      b1: of Adam, as `b2` and `eps`.
      mask: of the weight decay, which is decoupled for both.
    """
    matrices = optax.chain(
        scale_by_muon(weight_dimension_numbers=lambda tree: jax.tree.map(lambda _: _MATRIX, tree)),
        optax.stateless(lambda updates, _: jax.tree.map(_scale, updates)),
    )
    return optax.chain(
        optax.partition({"muon": matrices, "adam": optax.scale_by_adam(b1, b2, eps)}, labels),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(schedule),
    )


def labels(params: PyTree) -> PyTree:
    """`"muon"` for the kernels of `LAYERS`, `"adam"` for every other parameter."""

    def label(path: Any, leaf: Any) -> str:
        names = [key.key for key in path[-2:]]
        matrix = names[-1] == "kernel" and names[0] in LAYERS and leaf.ndim <= 3
        return "muon" if matrix else "adam"

    return jax.tree_util.tree_map_with_path(label, params)


def _scale(update: jax.Array) -> jax.Array:
    return _RMS * math.sqrt(max(update.shape[-2:])) * update
