"""CaiT-XXS24 with patches of 4 on CIFAR-10 (TFDS `cifar10`, prepared as array_record), from scratch, on one GPU.

Command: python train.py --config=configs/cifar10.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Aim: 95.8 % top-1 after 300 passes. Not a result: a published CaiT of 9M parameters has 94.9 % after as many
passes, and its best variant 95.8 %.
"""

from ml_collections import ConfigDict

from configs import cifar


def get_config() -> ConfigDict:
    config = cifar.from_scratch()
    config.model.name = "cait_xxs24"  # LayerScale starts at 1e-5, the paper's rule for depth 24
    config.model.patch_size = 4
    config.model.dtype = "bfloat16"
    config.batch_size = 256
    config.epochs = 300.0
    config.augment.pad_crop = 4
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.grad_clip_norm = 1.0
    config.optimizer.ema_decay = 0.9998  # over the last 5,000 of 58,600 steps
    config.eval.every_epochs = 5.0
    return config
