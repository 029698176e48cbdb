"""DeiT-S on ImageNet-1k at 224 pixels, from scratch.

Command: python train.py --config=configs/deit_small.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2012.12877, 300 epochs): 79.9 % top-1.
"""

from ml_collections import ConfigDict

from configs import deit_recipe


def get_config() -> ConfigDict:
    return deit_recipe.train("deit_small")
