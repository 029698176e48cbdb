"""What a report shows of images, in one jitted function for each network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from cait_jax.explain.attention import (
    class_rows,
    patch_grid,
    self_attention,
    special_tokens,
)
from cait_jax.explain.attribution import attention_rollout, relevance
from cait_jax.explain.faithfulness import centre_blob, deletion_insertion, random_maps
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import forward_intermediates

# Maps that are the same for every class; relevance follows, a map for each class.
CLASS_FREE = ("class_attention", "rollout", "random", "centre")


def map_kinds(model: CaiT) -> tuple[str, ...]:
    """The kinds of self-attention that differ: weights, and where heads are mixed those after mixing."""
    return ("weights", "mixed_weights") if model.talking_heads else ("weights",)


def class_specials(model: CaiT) -> list[int]:
    """For each row of `class_rows` the number of tokens in front of the patches."""
    return [1] * (model.class_depth or 0) or [n for n in special_tokens(model) if n]


def self_attention_values(model: CaiT, *, head_means: bool) -> int:
    """How many values the self-attention of one image has, of all kinds."""
    rows, columns = patch_grid(model)
    heads = 1 if head_means else model.num_heads
    each = sum((rows * columns + special) ** 2 for special in special_tokens(model))
    return each * heads * len(map_kinds(model))


def look(
    model: CaiT,
    *,
    top: int,
    extra: Sequence[int] = (),
    head_means: bool = False,
    with_self_attention: bool = True,
    steps: int = 14,
    seed: int = 0,
) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """A pure function of variables and normalised images.

    It gives a dict of arrays, the batch first:
      `classes` int32 and `probabilities` (batch, k): the `top` most probable classes, then `extra`; k is 0
        without a head;
      `self`: for each of `map_kinds` a list by layer of (batch, heads, queries, keys), special tokens first; one
        head, the mean, with `head_means`; left out without `with_self_attention`;
      `class_rows`: for each kind a list of (batch, heads, keys), the class token's rows (see `class_specials`);
      `maps` (batch, 4 + k, rows, columns): those of `CLASS_FREE`, then the relevance of each class;
      `deletion`, `insertion` (batch, 4 + k, k, steps + 1): the probability of each class along each map's curve.
    """
    kinds, top = map_kinds(model), min(top, model.num_classes)

    def heads(maps: Array) -> Array:
        return maps.mean(axis=1, keepdims=True) if head_means else maps

    def function(variables: Mapping[str, Any], images: Any) -> dict[str, Any]:
        logits, inside = forward_intermediates(model, variables, images)
        rows = {kind: class_rows(model, inside, kind) for kind in kinds}
        found: dict[str, Any] = {
            "class_rows": {kind: [heads(row) for row in rows[kind]] for kind in kinds}
        }
        if with_self_attention:
            found["self"] = {
                kind: [heads(maps) for maps in self_attention(model, inside, kind)]
                for kind in kinds
            }
        classes, found["probabilities"] = _classes(model, logits, top, extra)
        found["classes"] = classes
        batch, grid = images.shape[0], patch_grid(model)
        read = rows[kinds[-1]][0 if model.class_depth else -1].mean(axis=1)
        maps = [
            read[:, -grid[0] * grid[1] :].reshape(batch, *grid),
            attention_rollout(model, inside),
            random_maps(images, (batch, *grid), seed),
            jnp.broadcast_to(centre_blob(*grid), (batch, *grid)),
        ]
        if classes.shape[1]:
            of_class = jax.lax.map(
                lambda chosen: relevance(model, variables, images, chosen), classes.T
            )
            stacked = jnp.concatenate([jnp.stack(maps), of_class])
            curves = deletion_insertion(model, variables, images, classes, stacked, steps=steps)
            found["deletion"] = curves.deletion.swapaxes(0, 1)
            found["insertion"] = curves.insertion.swapaxes(0, 1)
        else:
            stacked = jnp.stack(maps)
        found["maps"] = stacked.swapaxes(0, 1)
        return {
            name: jax.tree.map(lambda a: a if name == "classes" else a.astype(jnp.float32), part)  # noqa: B023
            for name, part in found.items()
        }

    return function


def _classes(
    model: CaiT, logits: Float[Array, "batch outputs"], top: int, extra: Sequence[int]
) -> tuple[Int[Array, "batch chosen"], Float[Array, "batch chosen"]]:
    if not model.num_classes:
        none = jnp.zeros((logits.shape[0], 0))
        return none.astype(jnp.int32), none
    probabilities = jax.nn.softmax(logits, axis=-1)
    _, best = jax.lax.top_k(probabilities, top)
    wanted = jnp.broadcast_to(jnp.asarray(extra, best.dtype), (logits.shape[0], len(extra)))
    classes = jnp.concatenate([best, wanted], axis=1)
    return classes, jnp.take_along_axis(probabilities, classes, axis=1)
