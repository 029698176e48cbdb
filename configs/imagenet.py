"""ImageNet-1k: what its recipes share beside the defaults, which are the paper's."""

from ml_collections import ConfigDict

from configs import common


def recipe(name: str) -> ConfigDict:
    """The paper's recipe for a model, computed in bfloat16; parameters, optimiser and averages are float32.

    What is no matrix product is computed anew going back, which costs less than to keep and fetch it.

    Args:
      name: of `cait_jax.list_models()`.
    """
    config = common.get_config()
    config.model.name = name
    config.model.dtype = "bfloat16"
    config.model.remat = "elementwise"
    config.augment.mix_rows = 64  # the batch of a process in the authors' runs of 16 x 64
    return config
