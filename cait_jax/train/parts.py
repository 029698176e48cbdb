"""Parts of a network that learn more slowly, or not at all: layer-wise rates and freezing.

Two numberings: `layer_ids` for layer-wise rates, which are timm's; `block_numbers` for freezing, in the order
of computation. They differ in CaiT's class-attention blocks. Stacked blocks are arrays with a leading depth
axis, and a number, factor or mark then has one value for each slice.
"""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from cait_jax.errors import UserError, can_set, setting

_SELF_ATTENTION = re.compile(r"blocks_(\d+)")
_CLASS_ATTENTION = re.compile(r"blocks_token_only_(\d+)")
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "dist_token")
_HEADS = ("head", "head_dist")
_CLASS_STAGE = ("cls_token", "norm", *_HEADS)

# From a parameter tree to one of factors, or of marks, that broadcast against it.
OfParams = Callable[[Any], Any]


def layer_ids(params: Any) -> Any:
    """Layer ids for layer-wise rates, equal to those of timm's `group_matcher` for CaiT, ViT and DeiT.

    Embeddings and tokens are 0, self-attention blocks 1 to `depth`, heads `depth + 1`. Class-attention blocks
    share the last ids of self-attention, the last of them `depth`; so does the last norm.

    Args:
      params: a parameter tree, stacked or not; arrays, or their shapes.

    Returns:
      The same tree of int64 numpy arrays, of shape () or, in stacked blocks, (depth, 1, ..., 1) with the rank of
      the parameter.

    Raises:
      UserError: for a network of other parts.
    """
    depth, class_depth = _depths(params)
    return _numbered(params, class_attention=max(depth - class_depth + 1, 0), last=depth)


def block_numbers(params: Any) -> Any:
    """Numbers blocks in the order of computation, which is what freezing counts by.

    As `layer_ids`, but class-attention blocks are `depth + 1` and up, the last norm has the number of the
    last of them, and heads one above.
    """
    depth, class_depth = _depths(params)
    return _numbered(params, class_attention=depth + 1, last=depth + class_depth)


def _depths(params: Any) -> tuple[int, int]:
    """Numbers of self-attention and class-attention blocks."""
    if "blocks" in params:
        depth = jax.tree.leaves(params["blocks"])[0].shape[0]
    else:
        depth = sum(_SELF_ATTENTION.fullmatch(name) is not None for name in params)
    return depth, sum(_CLASS_ATTENTION.fullmatch(name) is not None for name in params)


def _numbered(params: Any, *, class_attention: int, last: int) -> Any:
    """Numbers from that of the first class-attention block and that of the last block."""
    depth, _ = _depths(params)

    def number(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[0].key
        if name == "blocks":
            return np.arange(1, depth + 1, dtype=np.int64).reshape(-1, *(1,) * (leaf.ndim - 1))
        if name in _EMBEDDINGS:
            return np.asarray(0)
        if name in _HEADS:
            return np.asarray(last + 1)
        if name == "norm":
            return np.asarray(last)
        if found := _SELF_ATTENTION.fullmatch(name):
            return np.asarray(1 + int(found[1]))
        if found := _CLASS_ATTENTION.fullmatch(name):
            return np.asarray(class_attention + int(found[1]))
        raise UserError(
            f"the parameters {name!r} belong to no layer of a transformer: rates by layer and "
            "freezing are for CaiT, ViT and DeiT"
        )

    return jax.tree_util.tree_map_with_path(number, params)


def layer_decay(params: Any, rate: float) -> Any:
    """Factors of the learning rate that shrink from the head down (Bao et al., arXiv 2106.08254).

    Equal to the `lr_scale` of timm's `param_groups_layer_decay`.

    Args:
      params: a parameter tree, stacked or not.
      rate: what a layer has over the one above, in (0, 1]; 0.65 to 0.9 where networks are fine-tuned.

    Returns:
      `rate ** (largest id - id)` as float64 numpy arrays shaped as in `layer_ids`; 1 for the heads.

    Raises:
      UserError: for a rate outside (0, 1], or a network without such layers.
    """
    if not 0 < rate <= 1:
        raise UserError(
            f"a layer decay of {rate} makes no sense: choose it in (0, 1], such as 0.75"
        )
    ids = layer_ids(params)
    last = max(int(leaf.max()) for leaf in jax.tree.leaves(ids))
    return jax.tree.map(lambda id_: np.asarray(np.power(rate, last - id_)), ids)


def trainable(params: Any, part: str | int) -> Any:
    """Marks what learns while everything else is frozen.

    Args:
      params: a parameter tree, stacked or not.
      part: `"all"`; `"head"`: the heads alone, the backbone being frozen; `"class_attention"`: all that comes
        after the patches are done (class token, class-attention blocks, norm and heads); a number k: the
        last k blocks, norm and heads. Class-attention blocks are the last blocks.

    Returns:
      Bool numpy arrays shaped as in `block_numbers`.

    Raises:
      UserError: for a part that the network does not have, or a network without such layers.
    """
    numbers = block_numbers(params)
    if part == "all":
        return jax.tree.map(lambda number: np.ones_like(number, bool), numbers)
    heads = [name for name in _HEADS if name in params]
    if not heads:
        raise UserError(
            "the model has no head to train: choose one with a head"
            + f", {setting('num_classes')} above 0" * can_set("num_classes")
        )
    blocks = int(jax.tree.leaves(numbers[heads[0]])[0]) - 1
    if part == "class_attention":
        if not any(_CLASS_ATTENTION.fullmatch(name) for name in params):
            raise UserError(
                f"the model has no class-attention blocks to train: set {setting('config.optimizer.train')} to "
                f"head, or a number of last blocks up to {blocks}"
            )
        return jax.tree_util.tree_map_with_path(
            lambda path, number: np.full_like(
                number,
                path[0].key in _CLASS_STAGE or bool(_CLASS_ATTENTION.fullmatch(path[0].key)),
                bool,
            ),
            numbers,
        )
    last = 0 if part == "head" else part
    if isinstance(last, str) or not 0 <= last <= blocks:
        raise UserError(
            f"the model has no part {part!r}: set {setting('config.optimizer.train')} to all, head, "
            f"class_attention or a number of last blocks from 0 to {blocks}"
        )
    return jax.tree.map(lambda number: np.asarray(number > blocks - last), numbers)


def by_part(
    optimizer: optax.GradientTransformation, factors: OfParams
) -> optax.GradientTransformation:
    """Multiplies the learning rate of each parameter; a factor of 0 freezes it.

    The update of what is frozen is exactly 0: neither weight decay nor moments of the past move it, and with
    `apply_updates` it keeps its bits. Its gradient does not count towards clipping.

    Args:
      optimizer: clipping, decay and learning rate included.
      factors: from parameters to factors or marks that broadcast against them: `layer_decay` or `trainable`
        with their other arguments filled in, or a product of both.

    Returns:
      The transformation; it needs the parameters in `update`.
    """

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_params = factors(params)
        updates, state = optimizer.update(without_frozen(gradient, of_params), state, params)
        return scale_updates(updates, of_params), state

    return optax.GradientTransformation(optimizer.init, update)


def without_frozen(gradient: Any, factors: Any) -> Any:
    """The gradient with zeros where the factor is 0."""
    return jax.tree.map(lambda g, f: jnp.where(f != 0, g, jnp.zeros_like(g)), gradient, factors)


def scale_updates(updates: Any, factors: Any) -> Any:
    """Updates times factors: exactly 0 where the factor is, even for updates that are not finite."""
    return jax.tree.map(
        lambda u, f: jnp.where(f != 0, u * jnp.asarray(f, u.dtype), jnp.zeros_like(u)),
        updates,
        factors,
    )


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`, but what is updated by 0 keeps its bits.

    A sum does not promise that: processors that flush subnormal numbers turn 1e-42 + 0 into 0.

    Args:
      params: a parameter tree.
      updates: the same tree.

    Returns:
      The next parameters, of the parameters' own dtypes.
    """
    return jax.tree.map(
        lambda update, old, new: jnp.where(update == 0, old, new),
        updates,
        params,
        optax.apply_updates(params, updates),
    )


def stop_frozen(params: Any, mask: Any) -> Any:
    """The parameters, with no gradient where the mask is False, so that none is computed in vain.

    Inside a loss it also keeps frozen parameters out of the gradient's norm. Only arrays frozen whole save time:
    stacked blocks are one loop, and its backward pass runs through all of them or none.

    Args:
      params: a parameter tree.
      mask: of `trainable`, or traced bool arrays that broadcast against the parameters.
    """

    def stop(leaf: Any, learns: Any) -> Any:
        if isinstance(learns, np.ndarray):
            if learns.all():
                return leaf
            if not learns.any():
                return jax.lax.stop_gradient(leaf)
        return jnp.where(learns, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(stop, params, mask)
