r"""CaiT-XXS24 on ImageNet-1k, fine-tuned at 384 pixels after configs/cait_xxs24.py.

Command: python train.py --config=configs/cait_xxs24_384.py --config.data.data_dir=DIR \
  --config.init.weights=runs/cait_xxs24
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2103.17239, without distillation, 384 pixels): 80.4 % top-1.
"""

from ml_collections import ConfigDict

from configs import cait_xxs24, higher_resolution


def get_config() -> ConfigDict:
    return higher_resolution.cait(cait_xxs24.get_config(), 384)
