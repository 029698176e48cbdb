"""CaiT-XXS36 on ImageNet-1k at 224 pixels, from scratch, by the paper's recipe (docs/recipe.md).

Command: python train.py --config=configs/cait_xxs36.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2103.17239, without distillation, 224 pixels): 79.1 % top-1.
The paper reports the raw parameters (eval/accuracy), not their average (eval/ema_accuracy).
"""

from ml_collections import ConfigDict

from configs import imagenet


def get_config() -> ConfigDict:
    return imagenet.recipe("cait_xxs36")
