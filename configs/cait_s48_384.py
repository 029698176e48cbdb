r"""CaiT-S48 on ImageNet-1k, fine-tuned at 384 pixels after configs/cait_s48.py.

Command: python train.py --config=configs/cait_s48_384.py --config.data.data_dir=DIR \
  --config.init.weights=runs/cait_s48
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2103.17239, without distillation, 384 pixels): 85.1 % top-1.
"""

from ml_collections import ConfigDict

from configs import cait_s48, higher_resolution


def get_config() -> ConfigDict:
    return higher_resolution.cait(cait_s48.get_config(), 384)
