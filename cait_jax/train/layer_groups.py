"""Layers that are trained more slowly, later or not at all: layer decay, freezing and phases.

Two numberings: `layer_ids` for layer decay, which are timm's; `block_numbers` for freezing, in the order of
computation. They differ in CaiT's class-attention blocks. Stacked blocks are arrays with a leading depth axis, and
an id, factor or mask then has one value for each slice.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Int
from ml_collections import ConfigDict

from cait_jax.errors import UserError, can_set, setting

_SELF_ATTENTION = re.compile(r"blocks_(\d+)")
_CLASS_ATTENTION = re.compile(r"blocks_token_only_(\d+)")
_EMBEDDINGS = ("patch_embed", "pos_embed", "cls_token", "dist_token", "reg_token")
_HEADS = ("head", "head_dist")
_NORMS = ("norm", "fc_norm")  # after all blocks
_CLASS_STAGE = ("cls_token", *_NORMS, *_HEADS)

# From parameters to factors or masks that broadcast against them.
OfParams = Callable[[Any], Any]
# From parameters and step to the parameters, frozen ones behind `stop_gradient`.
Freeze = Callable[[Any, Any], Any]
MakeOptimizer = Callable[[optax.Schedule], optax.GradientTransformation]


def grouped_from_config(
    config: ConfigDict, optimizer: optax.GradientTransformation
) -> tuple[optax.GradientTransformation, Freeze | None]:
    """The optimiser with `optimizer.layer_decay` and `optimizer.train`; and what freezes the rest."""
    name, decay = config.optimizer.train, config.optimizer.layer_decay
    part = int(name) if name.isdecimal() else name

    def factors(params: Any) -> Any:
        masks, rates = trainable(params, part), layer_decay(params, decay)
        return jax.tree.map(lambda mask, rate: mask * rate, masks, rates)

    def freeze(params: Any, step: Any) -> Any:
        del step
        return stop_frozen(params, trainable(params, part))

    return scaled_by_group(optimizer, factors), None if part == "all" else freeze


def phased_from_config(
    config: ConfigDict, examples: int, make: MakeOptimizer
) -> tuple[optax.GradientTransformation, optax.Schedule, int, Freeze]:
    """Optimiser, schedule, total steps and freezing of a config with `phases.head_epochs`."""
    settings = config.phases
    phases = head_then_blocks(
        examples / config.batch_size,
        head_epochs=settings.head_epochs,
        head_learning_rate=settings.head_learning_rate,
        blocks=settings.blocks,
        blocks_epochs=settings.blocks_epochs,
        blocks_learning_rate=settings.blocks_learning_rate,
    )
    steps = config.steps or sum(phase.steps for phase in phases)

    def freeze(params: Any, step: Any) -> Any:
        return stop_frozen(params, phase_mask(phases, params, step))

    return in_phases(make, phases), phase_rates(phases), steps, freeze


def layer_ids(params: Any) -> Any:
    """Layer ids for layer decay, equal to those of timm's `group_matcher` for CaiT, ViT and DeiT.

    Embeddings and tokens are 0, self-attention blocks 1 to `depth`, heads `depth + 1`. Class-attention blocks
    share the last ids of self-attention, the last of them `depth`; so does the last norm.

    Returns:
      The tree of `params` with int64 numpy arrays, of shape () or, in stacked blocks, (depth, 1, ..., 1) with the
      rank of the parameter.

    Raises:
      UserError: for a network of other layers.
    """
    depth, class_depth = _depths(params)
    return _numbered(params, class_attention=max(depth - class_depth + 1, 0), last=depth)


def block_numbers(params: Any) -> Any:
    """As `layer_ids`, in the order of computation, which freezing counts by.

    Class-attention blocks are `depth + 1` and up, the last norm has the number of the last of them, and heads are
    one above.
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
    """Ids, given that of the first class-attention block and that of the last block."""
    depth, _ = _depths(params)

    def number(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        name = path[0].key
        if name == "blocks":
            return np.arange(1, depth + 1, dtype=np.int64).reshape(-1, *(1,) * (leaf.ndim - 1))
        if name in _EMBEDDINGS:
            return np.asarray(0)
        if name in _HEADS:
            return np.asarray(last + 1)
        if name in _NORMS:
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

    `rate` is that of a layer over that of the one above, in (0, 1]; 0.65 to 0.9 for fine-tuning.

    Returns:
      `rate ** (largest id - id)` as float64 numpy arrays shaped as in `layer_ids`; 1 for the heads.

    Raises:
      UserError: for a rate outside (0, 1], or a network of other layers.
    """
    if not 0 < rate <= 1:
        raise UserError(
            f"a layer decay of {rate} makes no sense: choose it in (0, 1], such as 0.75"
        )
    ids = layer_ids(params)
    last = max(int(leaf.max()) for leaf in jax.tree.leaves(ids))
    return jax.tree.map(lambda id_: np.asarray(np.power(rate, last - id_)), ids)


def trainable(params: Any, part: str | int) -> Any:
    """True for what is trained while the rest is frozen.

    Args:
      params: of a transformer.
      part: `"all"`; `"head"`: the heads; `"class_attention"`: class token, class-attention blocks, last norm and
        heads; a number k: the last k blocks, norm and heads. Class-attention blocks are the last blocks.

    Returns:
      Bool numpy arrays shaped as in `block_numbers`.

    Raises:
      UserError: for a part that the network does not have, or a network of other layers.
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


def scaled_by_group(
    optimizer: optax.GradientTransformation, factors: OfParams
) -> optax.GradientTransformation:
    """Multiplies the learning rate of each parameter; a factor of 0 freezes it.

    A frozen parameter's update is exactly 0, whatever weight decay and moments say, and with
    `cait_jax.train.step.apply_updates` it keeps its bits. Its gradient does not count towards clipping.

    `optimizer` includes clipping, decay and learning rate; `factors` is `layer_decay` or `trainable` with their
    other arguments bound, or a product of both.
    """

    def update(gradient: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        of_params = factors(params)
        updates, state = optimizer.update(_without_frozen(gradient, of_params), state, params)
        return _scale(updates, of_params), state

    return optax.GradientTransformation(optimizer.init, update)


def _without_frozen(gradient: Any, factors: Any) -> Any:
    return jax.tree.map(lambda g, f: jnp.where(f != 0, g, jnp.zeros_like(g)), gradient, factors)


def _scale(updates: Any, factors: Any) -> Any:
    """Exactly 0 where the factor is, even for updates that are not finite."""
    return jax.tree.map(
        lambda u, f: jnp.where(f != 0, u * jnp.asarray(f, u.dtype), jnp.zeros_like(u)),
        updates,
        factors,
    )


def stop_frozen(params: Any, mask: Any) -> Any:
    """The parameters, behind `stop_gradient` where the mask is False.

    In a loss this also keeps frozen parameters out of the gradient's norm. Only arrays that are frozen as a whole
    save time: stacked blocks are one scan, whose backward pass runs through all of them or none. `mask` is that of
    `trainable`, or traced bool arrays that broadcast against the parameters.
    """

    def stop(leaf: Any, trained: Any) -> Any:
        if isinstance(trained, np.ndarray):
            if trained.all():
                return leaf
            if not trained.any():
                return jax.lax.stop_gradient(leaf)
        return jnp.where(trained, leaf, jax.lax.stop_gradient(leaf))

    return jax.tree.map(stop, params, mask)


@dataclasses.dataclass(frozen=True)
class Phase:
    """A part of a run with its own constant learning rate.

    Attributes:
      steps: its length; the last phase lasts as long as the run does.
      learning_rate: constant.
      part: what is trained, see `trainable`.
    """

    steps: int
    learning_rate: float
    part: str | int = "all"


class PhasedState(NamedTuple):
    """State of `in_phases`: steps taken, and the inner optimiser's state."""

    count: Any
    inner: Any


def head_then_blocks(
    steps_per_epoch: float,
    *,
    head_epochs: float = 5.0,
    head_learning_rate: float = 1e-3,
    blocks: int = 4,
    blocks_epochs: float = 15.0,
    blocks_learning_rate: float = 1e-5,
) -> tuple[Phase, Phase]:
    """Fine-tuning on little data: first the new head, then also the last blocks, slowly.

    Usually with a weight decay of 0.01. `blocks` counts the last blocks of the second phase, class attention
    included. A phase of more than 0 epochs has at least one step.
    """
    first = round(head_epochs * steps_per_epoch)
    both = round((head_epochs + blocks_epochs) * steps_per_epoch)
    first = max(first, int(head_epochs > 0))
    both = max(both, first + int(blocks_epochs > 0))
    return (
        Phase(first, head_learning_rate, "head"),
        Phase(both - first, blocks_learning_rate, blocks),
    )


def phase_at(phases: Sequence[Phase], step: Int[Array, ""] | int) -> Int[Array, ""]:
    """The index of the phase of a step, steps counted from 0."""
    return jnp.searchsorted(jnp.asarray(_starts(phases)[1:]), jnp.asarray(step), side="right")


def phase_rates(phases: Sequence[Phase]) -> optax.Schedule:
    """The phases' learning rates as a schedule.

    Raises:
      UserError: without phases, or for one of no steps.
    """
    if not phases or any(phase.steps < 1 for phase in phases):
        raise UserError(
            f"phases of {[phase.steps for phase in phases]} steps make no run: give at least one, each "
            "of at least 1 step, by more epochs"
        )
    return lambda step: jnp.asarray([phase.learning_rate for phase in phases])[
        phase_at(phases, step)
    ]


def phase_mask(phases: Sequence[Phase], params: Any, step: Int[Array, ""] | int) -> Any:
    """What is trained in a step, which is counted from 0 and may be traced.

    Returns:
      Bool arrays that broadcast against the parameters; numpy arrays, known while tracing, for parameters
      that are trained in all phases or in none.

    Raises:
      UserError: for a part that the network does not have.
    """
    phase = phase_at(phases, step)

    def at(*masks: np.ndarray) -> Any:
        if all(np.array_equal(mask, masks[0]) for mask in masks):
            return masks[0]
        return jnp.asarray(np.stack(masks))[phase]

    return jax.tree.map(at, *(trainable(params, phase.part) for phase in phases))


def in_phases(make: MakeOptimizer, phases: Sequence[Phase]) -> optax.GradientTransformation:
    """An optimiser whose state is reset at the start of every phase, with the phase's rate and part.

    Reset, because moments and bias corrections that counted through earlier phases would make the first updates of
    a newly trained parameter several times too large. Updates of frozen parameters are exactly 0. `make` is from a
    schedule to an optimiser, such as `make_optimizer` with its other arguments bound.

    Raises:
      UserError: without phases, or for one of no steps; while tracing, for a part that the network does not have.
    """
    rates = phase_rates(phases)
    optimizer = make(optax.constant_schedule(1.0))
    starts = _starts(phases)[1:]

    def init(params: Any) -> PhasedState:
        return PhasedState(jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(gradient: Any, state: PhasedState, params: Any = None) -> tuple[Any, PhasedState]:
        begins = jnp.any(starts == state.count)
        inner = jax.tree.map(
            functools.partial(jnp.where, begins), optimizer.init(params), state.inner
        )
        mask = phase_mask(phases, params, state.count)
        updates, inner = optimizer.update(_without_frozen(gradient, mask), inner, params)
        rate = rates(state.count)
        updates = jax.tree.map(lambda update: rate.astype(update.dtype) * update, updates)
        count = optax.safe_increment(state.count)
        return _scale(updates, mask), PhasedState(count, inner)

    return optax.GradientTransformation(init, update)


def _starts(phases: Sequence[Phase]) -> np.ndarray:
    return np.cumsum([0, *(phase.steps for phase in phases[:-1])], dtype=np.int32)
