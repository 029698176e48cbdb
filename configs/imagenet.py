"""ImageNet-1k: what its recipes share beside the defaults, which are the paper's."""

from ml_collections import ConfigDict

from configs import common


def recipe(name: str) -> ConfigDict:
    """The recipe for a model, with the schedule of the published code: one rate an epoch, changed after it.

    Activations are bfloat16; parameters, optimiser and averages are float32. The backward pass rematerialises
    everything but matrix products. docs/recipe.md lists what differs from the authors' code.

    Args:
      name: of `cait_jax.list_models()`.
    """
    config = common.get_config()
    config.model.name = name
    config.model.dtype = "bfloat16"
    config.model.remat = "elementwise"
    config.augment.mix_rows = 64  # the batch of a process in the authors' runs of 16 x 64
    config.optimizer.per_epoch = True
    return config
