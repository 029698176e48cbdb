"""DINO, without labels (Caron et al., arXiv 2104.14294); a classifier starts from the backbone by `init.weights`.

`:cifar10` has the CaiT and the settings of Gani et al., "How to Train Vision Transformer on Small-scale Datasets?"
(arXiv 2210.07240) without its blur; they report 96.42 % of CIFAR-10 after `cifar10.py:finetune`. `:imagenet` is
the paper's recipe for S size, 300 epochs, with crops cut from images squeezed to 224 pixels. `:small` is for two
CPU cores.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument
from configs import cifar10, imagenet


def get_config(argument: str = "") -> ConfigDict:
    check_argument("dino", argument, ("cifar10", "imagenet", "small"))
    if argument == "imagenet":
        return _imagenet()
    config = without_labels(cifar10.from_scratch())
    config.model.update(name="cait_xxs24", patch_size=4, mlp_ratio=2.0, dtype="bfloat16")
    config.model.drop_path_rate = 0.1
    config.update(batch_size=512, epochs=200.0)
    config.optimizer.update(learning_rate=1e-4, warmup_epochs=30.0)
    config.dino.update(global_scale=(0.7, 1.0), second_scale=(0.5, 1.0), local_scale=(0.2, 0.5))
    config.dino.update(local_size=16, out_dim=1024, teacher_temp_epochs=10.0)
    # Of 32 pixels it leaves little (SimCLR, arXiv 2002.05709, appendix B.9).
    config.dino.blur = False
    config.eval.every_epochs = 10.0
    return _small(config) if argument == "small" else config


def without_labels(config: ConfigDict) -> ConfigDict:
    """Turns a recipe into DINO's with its schedules, without what mixes or erases images."""
    config.objective = "dino"
    config.augment.rand_augment = ""
    config.augment.color_jitter = 0.4
    config.augment.reprob = config.augment.mixup = config.augment.cutmix = 0.0
    config.optimizer.ema_decay = 0.0  # the teacher is one
    config.optimizer.weight_decay = 0.04
    config.optimizer.final_weight_decay = 0.4
    config.optimizer.final_learning_rate = 1e-6
    config.optimizer.grad_clip_norm = 3.0
    return config


def _small(config: ConfigDict) -> ConfigDict:
    small = cifar10.get_config("small").model
    for key in ("name", "depth", "width", "num_heads", "drop_path_rate", "stacked"):
        config.model[key] = small[key]
    config.model.dtype = "float32"
    config.update(batch_size=128, epochs=20.0)
    config.augment.color_jitter = 0.2
    config.optimizer.update(learning_rate=1e-3, warmup_epochs=2.0)
    config.dino.update(local_crops=4, head_hidden=512, bottleneck=128, out_dim=256)
    config.dino.teacher_temp = config.dino.teacher_temp_start
    config.dino.teacher_momentum = 0.98  # in few steps a slower teacher stays what it was drawn as
    config.eval.every_epochs = 4.0
    return config


def _imagenet() -> ConfigDict:
    config = without_labels(imagenet.recipe("cait_s24"))
    config.data.aug_repeats = 1
    config.augment.scale = (1.0, 1.0)  # the host gives whole images, the device cuts the crops
    config.update(batch_size=1024, epochs=300.0)
    config.optimizer.update(per_epoch=False, learning_rate=5e-4, reference_batch=256)
    config.optimizer.update(warmup_epochs=10.0, warmup_learning_rate=0.0)
    config.dino.local_scale = (0.05, 0.4)
    config.eval.every_epochs = 20.0
    return config
