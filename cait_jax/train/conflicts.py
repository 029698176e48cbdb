"""Settings that exclude each other, or that nothing reads beside others."""

from collections.abc import Callable, Mapping
from typing import Any

from cait_jax.errors import UserError

Settings = Mapping[str, Any]

# What is refused, and what to do about it.
_CONFLICTS: tuple[tuple[Callable[[Settings], Any], str], ...] = (
    (
        lambda of: of["augment.three_augment"] and of["augment.rand_augment"],
        "--config.augment.three_augment replaces RandAugment, which is on: set "
        "--config.augment.rand_augment= (empty), or leave three_augment out",
    ),
    (
        lambda of: of["augment.color_jitter"] and of["augment.rand_augment"],
        "--config.augment.color_jitter has no place beside RandAugment, which changes colours itself: set "
        "--config.augment.rand_augment= (empty), or --config.augment.color_jitter=0",
    ),
    (
        lambda of: of["augment.mix_rows"] % 2,
        "--config.augment.mix_rows must be even, or 0 for the whole batch: in an odd group one image would be "
        "mixed with itself",
    ),
    (
        lambda of: of["distill.kind"] == "none" and of["distill.weights"] is not None,
        "--config.distill.weights is given and nothing learns from it: set --config.distill.kind to hard or "
        "soft",
    ),
    (
        lambda of: of["distill.logits"] is not None and of["distill.weights"] is not None,
        "--config.distill.weights and --config.distill.logits both say what the teacher is: give one",
    ),
    (
        lambda of: (
            of["optimizer.schedule"] != "step"
            and (of["optimizer.decay_epochs"] is not None or of["optimizer.decay_rate"] is not None)
        ),
        "--config.optimizer.decay_epochs and --config.optimizer.decay_rate are for "
        "--config.optimizer.schedule=step: set that, or leave them out",
    ),
    (
        lambda of: of["phases.head_epochs"] and of["optimizer.train"] != "all",
        "--config.phases.head_epochs and --config.optimizer.train both say what learns: set "
        "--config.optimizer.train=all, or --config.phases.head_epochs=0",
    ),
    (
        lambda of: of["phases.head_epochs"] and of["optimizer.layer_decay"] != 1,
        "--config.optimizer.layer_decay has no effect on phases, whose rates are constant: set it to 1, or "
        "--config.phases.head_epochs=0",
    ),
    (
        lambda of: (
            of["model.layer_scale_init"] is not None
            and of["model.residual"] not in (None, "layerscale", "scalar")
        ),
        "--config.model.layer_scale_init is for --config.model.residual=layerscale or scalar: leave it out",
    ),
    (
        lambda of: of["optimizer.nesterov"] and not of["optimizer.momentum"],
        "--config.optimizer.nesterov needs momentum: set --config.optimizer.momentum, such as 0.9, or "
        "--config.optimizer.nesterov=False",
    ),
)


def check_conflicts(settings: Settings) -> None:
    """Refuses settings of which one would have no effect.

    Args:
      settings: dotted keys and values of a config.

    Raises:
      UserError: naming both settings.
    """
    for excluded, sentence in _CONFLICTS:
        if excluded(settings):
            raise UserError(sentence)
