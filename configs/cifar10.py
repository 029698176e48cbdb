"""A small CaiT on CIFAR-10 (TFDS `cifar10`, prepared as array_record), held in memory.

Command: python train.py --config=configs/cifar10.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.batch_size = 128
    config.epochs = 200.0
    config.image_size = 32

    config.model.name = "cait_xxs12_patch4_32"

    config.data.name = "cifar10"
    config.data.eval_split = "test"
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)

    config.augment.pad_crop = 4
    config.augment.rotate = 10.0
    config.augment.zoom = 0.1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch = 0
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.ema_decay = 0.0
    config.optimizer.clip_norm = 1.0
    return config
