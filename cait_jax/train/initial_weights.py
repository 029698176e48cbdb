"""Weights that a run starts from: `init.weights` or `init.pretrained` instead of the seed."""

from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import Literal, UserError, setting
from cait_jax.weights.pretrained import load_pretrained


def initial_params(config: ConfigDict, model: Any) -> Any:
    """The `params` tree that a config's `init` names, on the host; None where it names none.

    Args:
      config: `init.weights` is a file, a saved directory or a workdir; `init.pretrained` stands for the released
        weights of `model.name`; with `init.reset_head` the head is initialised from the seed.
      model: the run's; position embedding and patch kernel are resized to it.

    Raises:
      UserError: the weights cannot be had or do not fit, or both keys are given.
    """
    init = config.init
    if init.weights is None and not init.pretrained:
        if init.reset_head or init.ema:
            raise UserError(
                f"{setting('config.init.reset_head')} and {setting('config.init.ema')} go with "
                f"{setting('config.init.weights', Literal('PATH'))} or "
                f"{setting('config.init.pretrained', True)}: give one of these, or leave them out"
            )
        return None
    if init.weights is not None and init.pretrained:
        raise UserError(
            f"{setting('config.init.weights')} and {setting('config.init.pretrained')} both say where to "
            "start: give one"
        )
    loaded, variables = load_pretrained(
        config.model.name,
        weights=init.weights,
        image_size=model.image_size,
        num_classes=model.num_classes,
        in_channels=model.in_channels,
        reset_head=init.reset_head,
        ema=init.ema,
        seed=config.seed,
        **{key: value for key, value in config.model.items() if key != "name"},
    )
    assert loaded == model
    return variables["params"]
