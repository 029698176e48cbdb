"""DeiT-S with a distillation token on ImageNet-1k at 224 pixels, taught by RegNetY-16GF.

Command: python train.py --config=configs/deit_small_distilled.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2012.12877, 300 epochs, both heads averaged): 81.2 % top-1.
"""

from ml_collections import ConfigDict

from configs import deit_recipe


def get_config() -> ConfigDict:
    return deit_recipe.train_distilled("deit_small_distilled")
