"""CIFAR-10 at its own 32 pixels, in memory: what its recipes share."""

from ml_collections import ConfigDict

from configs import common


def from_scratch() -> ConfigDict:
    """The defaults for CIFAR-10 (TFDS `cifar10`): its splits and colours, a rate for the batch as it is."""
    config = common.get_config()
    config.image_size = 32
    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.data.aug_repeats = 1
    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch = 0
    return config
