"""CaiT-M48 on ImageNet-1k at 224 pixels, from scratch, by the paper's recipe (docs/recipe.md).

Command: python train.py --config=configs/cait_m48.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected: none recorded; the paper gives no result for it at 224 pixels without distillation.
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config() -> ConfigDict:
    return imagenet.recipe("cait_m48")
