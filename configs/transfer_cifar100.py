"""CaiT-S24, pre-trained on ImageNet-1k, on CIFAR-100 (TFDS `cifar100`) at 224 pixels.

Command: python train.py --config=configs/transfer_cifar100.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected: none recorded for this model. Touvron et al., arXiv 2103.17239, have
93.1 % for the larger CaiT-M36, distilled, at 224 pixels.
The settings are the author's for CIFAR-10 and Cars; none are known for this data set.
"""

from ml_collections import ConfigDict

from configs import transfer


def get_config() -> ConfigDict:
    config = transfer.with_sgd()
    config.data.name = "cifar100"
    config.data.eval_split = "test"
    config.eval.every_epochs = 10.0
    return config
