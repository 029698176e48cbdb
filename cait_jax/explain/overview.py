"""Everything that `cait explain` shows of images, as one function of variables and images."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from cait_jax.explain import attention, depth
from cait_jax.explain.attribution import attribute
from cait_jax.explain.faithfulness import compare
from cait_jax.explain.patches import cut_patches
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import forward_intermediates

Arrays = dict[str, Any]


def overview(
    model: CaiT,
    show: Sequence[str],
    *,
    methods: Sequence[str] = (),
    classes: Sequence[int] = (),
    patch: int | None = None,
    layer: int = 0,
    steps: int | None = None,
    seed: int = 0,
) -> Callable[[Any, Any], Arrays]:
    """A pure function of variables and normalised images to a dict of arrays whose first axis is the batch.

    It holds, with a head, `classes` (batch, c), those given or the most probable, and `probability`; of `show`

    - "attribution": `attribution`, a dict from each of `methods` to (batch, c, rows, columns); with `steps`,
      `deletion` and `insertion`, dicts to (batch, c, steps + 1), for the maps `random` and `centre` too;
    - "attention": `class_token` (batch, layers, heads, rows, columns);
    - "patch": `read_by_patch` and `readers_of_patch`, of the same shape, for `patch` (None: the middle);
    - "matrices": `matrices`, a dict from each kind to (batch, heads, queries, keys) of `layer`, counted over both
      stages;
    - "depth": `entropy`, `distance`, `share_on_special` and `share_on_most_read` (batch, layers, heads),
      `branch_ratio` (batch, blocks, 2), `cka` (batch, layers, layers) over an image's patches;
    - "patches": `patches` (batch, patches, values), normalised.
    """
    rows, columns = attention.patch_grid(model)
    at = rows // 2 * columns + columns // 2 if patch is None else patch
    batch_first = functools.partial(jnp.moveaxis, source=1, destination=0)

    def function(variables: Any, images: Array) -> Arrays:
        logits, inside = forward_intermediates(model, variables, images)
        found: Arrays = {}
        chosen = jnp.zeros((images.shape[0], 1), jnp.int32)
        if model.num_classes:
            probabilities = jax.nn.softmax(logits)
            if classes:
                chosen = jnp.tile(jnp.array([classes], jnp.int32), (images.shape[0], 1))
            else:
                chosen = probabilities.argmax(axis=-1)[:, None]
            found["classes"] = chosen
            found["probability"] = jnp.take_along_axis(probabilities, chosen, axis=1)
        if "attribution" in show:
            found |= _attributions(
                model, variables, images, chosen, methods=methods, steps=steps, seed=seed
            )
        if "attention" in show:
            found["class_token"] = batch_first(attention.class_token_maps(model, inside))
        if "patch" in show:
            found["patch"] = jnp.full((images.shape[0],), at)
            found["read_by_patch"] = batch_first(attention.read_by(model, inside, at))
            found["readers_of_patch"] = batch_first(attention.readers_of(model, inside, at))
        if "matrices" in show:
            found["matrices"] = {
                kind: attention.all_attention(model, inside, kind)[layer]
                for kind in attention.KINDS
            }
        if "depth" in show:
            found |= _statistics(model, variables, images, inside)
        if "patches" in show:
            found["patches"] = cut_patches(images, model.patch_size)
        return found

    return function


def _attributions(
    model: CaiT,
    variables: Any,
    images: Array,
    chosen: Array,
    *,
    methods: Sequence[str],
    steps: int | None,
    seed: int,
) -> Arrays:
    """`attribution`, and with `steps` both curves, of each class."""

    def of_class(classes: Array) -> Arrays:
        if steps is None:
            maps = {m: attribute(m, model, variables, images, classes) for m in methods}
            return {"attribution": maps}
        found = compare(methods, model, variables, images, classes, seed=seed, steps=steps)
        return {
            "attribution": {m: maps for m, (maps, _) in found.items()},
            "deletion": {m: curves.deletion for m, (_, curves) in found.items()},
            "insertion": {m: curves.insertion for m, (_, curves) in found.items()},
        }

    by_class = jax.lax.map(of_class, chosen.T)
    found: Arrays = jax.tree.map(lambda a: jnp.moveaxis(a, 0, 1), by_class)
    return found


def _statistics(model: CaiT, variables: Any, images: Array, inside: Any) -> Arrays:
    """Statistics by layer of each image by itself."""
    layers = attention.self_attention(model, inside, "weights")
    specials = attention.special_tokens(model)

    def by_image(statistic: Callable[[Array, int], Array]) -> Array:
        each = [
            jax.vmap(lambda weights, n=n: statistic(weights[None], n))(layer)
            for layer, n in zip(layers, specials, strict=True)
        ]
        return jnp.stack(each, axis=1)

    features = jnp.stack(depth.layer_features(model, inside), axis=1)
    found = {
        "entropy": by_image(lambda weights, n: depth.attention_entropy(weights)),
        "distance": by_image(lambda weights, n: depth.attention_distance(model, weights)),
        "share_on_most_read": by_image(depth.share_on_most_read),
        "branch_ratio": jax.vmap(lambda image: depth.branch_ratio(model, variables, image[None]))(
            images
        ),
        "cka": jax.vmap(depth.cka_matrix)(features),
    }
    if any(specials):
        found["share_on_special"] = by_image(depth.share_on_special)
    return found
