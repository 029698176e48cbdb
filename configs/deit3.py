"""DeiT III on ImageNet-1k (Touvron et al., arXiv 2204.07118), by the commands of the authors' README_revenge.md.

`:small` is trained at 224 pixels, `:base` and `:large` at 192, which `:base,224` and `:large,224` follow. Those at
384 pixels start from the run at 224.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument, default_workdir
from configs import imagenet

# Size to pixels, rate, and the images of a process, which share draws of mixing.
SIZES = {"small": (224, 4e-3, 256), "base": (192, 3e-3, 256), "large": (192, 3e-3, 64)}
DROP_PATH = {"small": 0.05, "base": 0.2, "large": 0.45}
# At a higher resolution: the argument to drop path, images of a process, and the run it starts from.
FINETUNED = {
    "base,224": (0.2, 64, "base"),
    "large,224": (0.45, 64, "large"),
    "small,384": (0.0, 64, "small"),
    "base,384": (0.15, 32, "base,224"),
    "large,384": (0.4, 16, "large,224"),
}


def get_config(argument: str = "") -> ConfigDict:
    check_argument("deit3", argument, (*SIZES, *FINETUNED))
    size, _, pixels = argument.partition(",")
    config = imagenet.recipe(f"deit3_{size}")
    config.augment.reprob = 0.0
    config.optimizer.reference_batch = 0
    if pixels:
        config.model.drop_path_rate, config.augment.mix_rows, start = FINETUNED[argument]
        config.init.weights = str(default_workdir(f"deit3.py:{start}"))
        config.update(image_size=int(pixels), batch_size=512, epochs=20.0)
        config.data.aug_repeats = 1
        config.optimizer.update(learning_rate=1e-5, weight_decay=0.1)
        return config
    config.model.drop_path_rate = DROP_PATH[size]
    config.image_size, config.optimizer.learning_rate, config.augment.mix_rows = SIZES[size]
    config.update(batch_size=2048, epochs=800.0)
    config.augment.update(rand_augment="", three_augment=True, color_jitter=0.3)
    config.loss.update(name="binary", smoothing=0.0)
    config.optimizer.update(name="lamb", eps=1e-8)
    return config
