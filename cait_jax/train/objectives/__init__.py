"""What is learnt: one objective a file, each a `cait_jax.train.step.Objective`."""

import importlib
from typing import Any

from ml_collections import ConfigDict

from cait_jax.data.split import Split

OBJECTIVES = ("supervised", "mae", "dino")


def from_config(config: ConfigDict, split: Split, **options: Any) -> Any:
    """The objective that a config names, for a training split; its module alone is imported.

    `options` are those of the module's own `from_config`.

    Raises:
      UserError: for a setting that does not fit.
    """
    module = importlib.import_module(f"{__name__}.{config.objective}")
    objective = module.from_config(config, split, **options)
    if not config.lora.rank:
        return objective
    from cait_jax.train.objectives import lora

    return lora.from_config(config, objective)
