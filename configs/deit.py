"""DeiT on ImageNet-1k (Touvron et al., arXiv 2012.12877, table 9): `:tiny`, `:small`, `:base`.

Drop path, 0.1 in the last block and growing linearly up to it, comes with the model. `:base,distilled` has a
second token and head, for the teacher (section 4). `:base,384` is the command in the authors' README_deit.md:
batch 512, rate and min-lr 5e-6, 30 epochs, weight decay 1e-8, all else by default.
"""

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument
from configs import imagenet

SIZES = ("tiny", "small", "base")


def get_config(argument: str = "") -> ConfigDict:
    check_argument("deit", argument, (*SIZES, *(f"{size},distilled" for size in SIZES), "base,384"))
    size, _, variant = argument.partition(",")
    config = imagenet.recipe(f"deit_{size}" + "_distilled" * (variant == "distilled"))
    config.epochs = 300.0
    config.eval.crop_pct = 0.875  # 224 of 256 pixels
    if variant == "distilled":
        config.distill.kind = "hard"
    if variant == "384":
        imagenet.higher_resolution(config, 384, f"deit.py:{size}")
        config.batch_size, config.epochs = 512, 30.0
        config.optimizer.weight_decay = 1e-8
    return config
