"""Published accuracies of the named models on ImageNet-1k's validation images, with their sources."""

import dataclasses

from cait_jax.models.zoo import VARIANTS
from cait_jax.weights.released import RELEASED


@dataclasses.dataclass(frozen=True)
class Result:
    """A published figure.

    Attributes:
      top1: in percent.
      source: who measured it, and how the model was trained where that is not the released weights.
    """

    top1: float
    source: str


# Trained at 224 pixels without distillation (Touvron et al., arXiv 2103.17239).
_UNDISTILLED = {
    "cait_xxs24": 77.6,
    "cait_xxs36": 79.1,
    "cait_xs24": 81.8,
    "cait_xs36": 82.6,
    "cait_s24": 82.7,
    "cait_s36": 83.3,
    "cait_s48": 83.5,
    "cait_m24": 83.4,
    "cait_m36": 83.8,
}


def published_result(name: str) -> Result | None:
    """The published accuracy of a named model.

    Args:
      name: of `cait_jax.list_models()`.

    Returns:
      Of the released weights where there are some, else of the architecture; None where nothing was published.
    """
    if name in _UNDISTILLED:
        return Result(_UNDISTILLED[name], "CaiT paper, without distillation")
    for released in RELEASED.values():
        if VARIANTS[released.name] == VARIANTS[name] and released.top1 is not None:
            return Result(released.top1, released.source)
    return None
