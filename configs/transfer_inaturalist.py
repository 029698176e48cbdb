"""CaiT-S24, pre-trained on ImageNet-1k, on iNaturalist 2018 (TFDS `i_naturalist2018`) at 224 pixels.

Command: python train.py --config=configs/transfer_inaturalist.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected: none recorded for this model.
"""

from ml_collections import ConfigDict

from configs import transfer


def get_config() -> ConfigDict:
    config = transfer.pretrained()
    config.epochs = 360.0
    config.data.name = "i_naturalist2018"
    config.model.drop_path_rate = 0.1
    config.augment.reprob = 0.1
    config.optimizer.learning_rate = 7.5e-5
    return config
