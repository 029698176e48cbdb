"""A small CaiT on scikit-learn's handwritten digits (1,437 training and 360 test images of 8x8 pixels).

The settings were chosen with --config.data.train_split=fit --config.data.eval_split=validation, two parts of
the training set.
"""

from ml_collections import ConfigDict

from configs import common


def get_config() -> ConfigDict:
    config = common.get_config()
    config.update(batch_size=64, epochs=110.0, image_size=8)
    config.model.name = "cait_nano4_patch4_8"
    config.data.update(name="digits", eval_split="test", aug_repeats=1)
    config.data.mean = config.data.std = (0.5,)
    config.augment.update(hflip=False, rand_augment="", reprob=0.0, mixup=0.0, cutmix=0.0)
    config.augment.update(rotate=10.0, zoom=0.1, shear=0.1, translate=0.1)
    config.optimizer.update(learning_rate=1e-3, reference_batch=0, ema_decay=0.0)
    config.optimizer.grad_clip_norm = 1.0
    config.loss.smoothing = 0.0
    config.eval.update(batch_size=360, every_epochs=10.0)
    config.checkpoint.every_steps = 500
    config.report.every_steps = 100
    return config
