"""Networks as NNX modules, by Flax's bridge."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from flax import nnx


def to_nnx(
    model: Any, variables: Mapping[str, Any], *, rngs: "nnx.Rngs | None" = None
) -> "nnx.Module":
    """An NNX module that holds a network's variables, and computes what `model.apply` does with them.

    Parameters are `nnx.Param`s at their paths in `params`, blocks stacked where the model stacks them; batch
    statistics of RegNetY are `nnx.BatchStat`s. Calls take what the network's take: `module(images)`, and in
    training `module(images, train=True)` with streams `dropout` and `drop_path`.

    Args:
      model: of this package.
      variables: such as `load_pretrained` gives.
      rngs: a fork of it serves calls that give none.
    """
    from flax import nnx

    module = nnx.bridge.ToNNX(model, rngs=rngs)
    for name, value in nnx.bridge.variables.linen_vars_to_nnx_attrs(dict(variables)).items():
        setattr(module, name, nnx.data(value))
    return module
