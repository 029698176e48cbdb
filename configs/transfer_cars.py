"""CaiT-S24, pre-trained on ImageNet-1k, on Stanford Cars (TFDS `cars196`) at 224 pixels.

Command: python train.py --config=configs/transfer_cars.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected: none recorded for this model. Touvron et al., arXiv 2103.17239, have
94.2 % for the larger CaiT-M36, distilled, at 224 pixels.
"""

from ml_collections import ConfigDict

from configs import transfer


def get_config() -> ConfigDict:
    config = transfer.with_sgd()
    config.data.name = "cars196"
    config.data.eval_split = "test"
    config.eval.every_epochs = 20.0
    return config
