"""The classifier of loaded weights: kept, left out, or started anew."""

import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.errors import UserError
from cait_jax.interface import Way, advise
from cait_jax.weights.published import published_names, to_published

_log = logging.getLogger(__name__)

# `head`, and `head_dist` of a distilled DeiT.
_HEAD = "head"


def fit_head(
    weights: Mapping[str, np.ndarray], model: Any, *, reset: bool = False, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Gives weights the head that a model has.

    A model of 0 classes has none: it is left out. With `reset` it starts as the model's own initialisation
    makes it, and one line of the log names what was replaced.

    Args:
      weights: published name to array.
      model: the model the weights are wanted for.
      reset: start the head anew.
      seed: what the new head is drawn from.

    Returns:
      The weights, and the names that were started anew.

    Raises:
      UserError: the weights fit but for a head of another number of classes, or none, and `reset` is False.
    """
    if model.num_classes == 0:
        body = {name: array for name, array in weights.items() if not _of_head(name)}
        return body, []

    def head(key: Any) -> dict[str, Any]:
        images = jnp.zeros((1, *model.image_size, model.in_channels))
        params = model.init(key, images)["params"]
        return {name: leaves for name, leaves in params.items() if name.startswith(_HEAD)}

    if reset:
        # Jitted, so that the initialisation of everything else is dropped before it runs.
        fresh = to_published({"params": jax.jit(head)(jax.random.key(seed))})
        _log.warning("started anew from seed %d: %s", seed, ", ".join(sorted(fresh)))
        return {**weights, **fresh}, sorted(fresh)

    shapes = jax.eval_shape(head, jax.random.key(0))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), shapes)
    if not any(_of_head(name) for name in weights):
        if not weights.keys() <= published_names(model):
            return dict(weights), []  # another network's, which `from_published` refuses
        raise UserError(
            f"these weights have no head, and the model has {model.num_classes} classes: "
            + advise(
                Way("give {} to start one anew", "reset_head", True),
                Way("{} for features", "num_classes", 0),
                otherwise="choose weights with a head",
            )
        )
    for name, array in to_published({"params": empty}).items():
        found = np.shape(weights.get(name, array))
        if found[:1] != array.shape[:1]:
            raise UserError(
                f"these weights have {found[0]} classes and the model {model.num_classes}: "
                + advise(
                    Way("give {} to start the head anew", "reset_head", True),
                    Way("{} to keep it", "num_classes", found[0]),
                    otherwise=f"choose weights of {model.num_classes} classes",
                )
            )
    return dict(weights), []


def _of_head(name: str) -> bool:
    return name.split(".", 1)[0] in (_HEAD, f"{_HEAD}_dist")
