r"""CaiT-XXS24 on ImageNet-1k at 224 pixels, taught by RegNetY-16GF: the paper's names with an upsilon.

That label and teacher share the one head, half of the loss each, is an assumption: no public code of it was found.

Command: python train.py --config=configs/cait_xxs24_distilled.py --config.data.data_dir=DIR
Hardware and time: none recorded; not yet run to its end here.
Expected at 224 pixels: 78.400 % top-1, timm's measurement of the released cait_xxs24_224. Fine-tuned at 384
pixels, still distilled, the released cait_xxs24_384 has 80.954 %:
  python train.py --config=configs/cait_xxs24_384.py --config.data.data_dir=DIR --config.distill.kind=hard \
    --config.init.weights=runs/cait_xxs24_distilled --workdir=runs/cait_xxs24_distilled_384
"""

from ml_collections import ConfigDict

from configs import cait_xxs24


def get_config() -> ConfigDict:
    config = cait_xxs24.get_config()
    config.distill.kind = "hard"  # on the one head, which is an assumption: see docs/recipe.md
    return config
