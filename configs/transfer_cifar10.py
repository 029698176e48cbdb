"""CaiT-S24, pre-trained on ImageNet-1k, on CIFAR-10 (TFDS `cifar10`) at 224 pixels.

Command: python train.py --config=configs/transfer_cifar10.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected: none recorded for this model. Touvron et al., arXiv 2103.17239, have
99.4 % for the larger CaiT-M36, distilled, at 224 pixels.
"""

from ml_collections import ConfigDict

from configs import transfer


def get_config() -> ConfigDict:
    config = transfer.with_sgd()
    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.eval.every_epochs = 10.0
    return config
