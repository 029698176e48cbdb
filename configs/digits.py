"""A small CaiT on scikit-learn's handwritten digits (1,437 training and 360 test images of 8x8 pixels).

The settings were chosen with --config.data.train_split=fit --config.data.eval_split=validation, two parts of
the training set.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.batch_size = 64
    config.epochs = 110.0
    config.image_size = 8

    config.model.name = "cait_nano4_patch4_8"

    config.data.name = "digits"
    config.data.eval_split = "test"
    config.data.mean = (0.5,)
    config.data.std = (0.5,)
    config.data.aug_repeats = 1

    config.augment.hflip = False
    config.augment.rand_augment = ""
    config.augment.reprob = 0.0
    config.augment.mixup = 0.0
    config.augment.cutmix = 0.0
    config.augment.rotate = 10.0
    config.augment.zoom = 0.1
    config.augment.shear = 0.1
    config.augment.translate = 0.1

    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch = 0
    config.optimizer.ema_decay = 0.0
    config.optimizer.grad_clip_norm = 1.0
    config.loss.smoothing = 0.0

    config.eval.batch_size = 360
    config.eval.every_epochs = 10.0
    config.checkpoint.every_steps = 500
    config.report.every_steps = 100
    return config
