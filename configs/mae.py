"""Masked autoencoding (He et al., arXiv 2111.06377), which needs no labels; a classifier then starts from it:

    python train.py --config=configs/mae.py:small
    python train.py --config=configs/cifar10.py:small --config.init.weights=runs/mae-small

`:imagenet` is the paper's (its table 8) with CaiT S24, for `cait_s24.py`. `:cifar10` has the CaiT of Gani et al.
(arXiv 2210.07240), for `cifar10.py:finetune`. `:small` is for two CPU cores. Rates and
lengths of these two are ours; nothing was tuned.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument
from configs import cifar10, common


def get_config(argument: str = "") -> ConfigDict:
    check_argument("mae", argument, ("cifar10", "imagenet", "small"))
    config = common.get_config() if argument == "imagenet" else cifar10.from_scratch()
    config.objective = "mae"
    config.augment.rand_augment = ""
    config.augment.reprob = config.augment.mixup = config.augment.cutmix = 0.0
    config.optimizer.b2 = 0.95
    config.optimizer.warmup_learning_rate = config.optimizer.final_learning_rate = 0.0
    config.optimizer.ema_decay = 0.0
    if argument == "small":
        return _small(config)
    config.model.update(dtype="bfloat16", drop_path_rate=0.0)
    config.epochs = 800.0
    config.optimizer.update(warmup_epochs=40.0, learning_rate=1.5e-4, reference_batch=256)
    config.eval.every_epochs = 20.0
    if argument == "imagenet":
        config.model.update(name="cait_s24", remat="elementwise")
        config.data.aug_repeats = 1
        config.augment.scale = (0.2, 1.0)
        config.batch_size = 4096
        return config
    config.model.update(name="cait_xxs24", patch_size=4, mlp_ratio=2.0)
    config.augment.pad_crop = 4
    config.batch_size = 512
    config.mae.update(decoder_depth=4, decoder_width=192, decoder_heads=4)
    return config


def _small(config: ConfigDict) -> ConfigDict:
    config.model = cifar10.get_config("small").model
    config.augment.pad_crop = 4
    config.mae.update(decoder_depth=1, decoder_width=96, decoder_heads=2)
    config.batch_size = 64
    config.epochs = 20.0
    config.optimizer.warmup_epochs = 1.0
    config.eval.every_epochs = 5.0
    return config
