"""Published accuracies of the named models on ImageNet-1k's validation images, with their sources."""

import dataclasses

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


# Trained at 224 pixels without distillation.
_CAIT = {
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

# Trained for 300 epochs, evaluated with a crop of 0.875.
_DEIT = {
    "deit_tiny": 72.2,
    "deit_small": 79.9,
    "deit_base": 81.8,
    "deit_tiny_distilled": 74.5,
    "deit_small_distilled": 81.2,
    "deit_base_distilled": 83.4,
}

_PAPERS = {
    **{name: Result(top1, "CaiT paper, without distillation") for name, top1 in _CAIT.items()},
    **{name: Result(top1, "DeiT paper, arXiv 2012.12877") for name, top1 in _DEIT.items()},
}


def published_result(name: str) -> Result | None:
    """The published accuracy of a named model.

    Args:
      name: of `cait_jax.list_models()`.

    Returns:
      Of the weights released under this name, else of the paper that trained the architecture; None where there is
      neither.
    """
    if name in RELEASED:
        row = RELEASED[name]
        return None if row.top1 is None else Result(row.top1, row.source)
    return _PAPERS.get(name)
