"""CaiT on CIFAR-10 (TFDS `cifar10`), from scratch: XXS24 with patches of 4; `:small` for an hour on two cores.

`:hour` is the best that is known for that hour: the network of `:small` by Muon, with larger patches first,

    python train.py --config=configs/cifar10.py:hour,patch8
    python train.py --config=configs/cifar10.py:hour --config.init.weights=runs/cifar10-hour,patch8

`:finetune` follows `dino.py:cifar10` or `mae.py:cifar10`, by `--config.init.weights=RUN`, with the network and the
settings of Gani et al. (arXiv 2210.07240; hananshafi/vits-for-small-scale-datasets, `finetune.py`), but for
RandAugment in place of AutoAugment's policy; without weights it is theirs from scratch.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument
from configs import common


def get_config(argument: str = "") -> ConfigDict:
    check_argument("cifar10", argument, ("", "finetune", "hour", "hour,patch8", "small"))
    config = from_scratch()
    config.augment.pad_crop = 4
    config.optimizer.grad_clip_norm = 1.0
    if argument == "small":
        return _small(config)
    if argument.startswith("hour"):
        return _hour(config, first=argument == "hour,patch8")
    config.model.name = "cait_xxs24"  # LayerScale starts at 1e-5, the paper's rule for depth 24
    config.model.patch_size = 4
    config.model.dtype = "bfloat16"
    config.batch_size = 256
    config.epochs = 300.0
    config.optimizer.warmup_epochs = 10.0
    config.optimizer.ema_decay = 0.9998  # over the last 5,000 of 58,600 steps
    config.eval.every_epochs = 5.0
    if argument == "finetune":
        config.epochs = 100.0
        config.model.update(mlp_ratio=2.0, drop_path_rate=0.1)
        config.data.aug_repeats = 3
        config.augment.update(mix_rows=64, mixup=1.0, mixup_prob=0.5)
        config.optimizer.update(grad_clip_norm=0.0, ema_decay=0.0)
    return config


def _small(config: ConfigDict) -> ConfigDict:
    config.model.name = "cait_xxs12_patch4_32"
    config.model.update(depth=4, width=96, num_heads=2, drop_path_rate=0.0)
    config.model.stacked = False  # a scan is the slower of the two on CPUs
    config.batch_size = 64
    config.epochs = 18.0
    # Twenty passes are too few to learn from images as changed as the default's.
    config.augment.update(rand_augment="", reprob=0.0, mixup=0.0, cutmix=0.0)
    config.optimizer.update(warmup_epochs=1.0, ema_decay=0.0)
    config.eval.every_epochs = 2.0
    return config


def _hour(config: ConfigDict, first: bool) -> ConfigDict:
    config = _small(config)
    config.batch_size = 128
    config.epochs, config.eval.every_epochs = (24.0, 8.0) if first else (40.0, 4.0)
    config.optimizer.update(name="muon", learning_rate=6e-3 if first else 3e-3)
    if first:
        config.model.patch_size = 8
    else:
        config.augment.reprob = 0.25
    return config


def from_scratch() -> ConfigDict:
    """What recipes for CIFAR-10 at its own 32 pixels share: splits, colours, a rate for the batch as it is."""
    config = common.get_config()
    config.image_size = 32
    config.data.update(name="cifar10", eval_split="test", aug_repeats=1)
    config.data.mean = (0.4914, 0.4822, 0.4465)
    config.data.std = (0.2470, 0.2435, 0.2616)
    config.optimizer.learning_rate = 1e-3
    config.optimizer.reference_batch = 0
    return config
