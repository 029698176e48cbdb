r"""CaiT-XS36 on ImageNet-1k, fine-tuned at 384 pixels after configs/cait_xs36.py.

Command: python train.py --config=configs/cait_xs36_384.py --config.data.data_dir=DIR \
  --config.init.weights=runs/cait_xs36
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2103.17239, without distillation, 384 pixels): 84.3 % top-1.
"""

from ml_collections import ConfigDict

from configs import cait_xs36, higher_resolution


def get_config() -> ConfigDict:
    return higher_resolution.cait(cait_xs36.get_config(), 384)
