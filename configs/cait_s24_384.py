r"""CaiT-S24 on ImageNet-1k, fine-tuned at 384 pixels after configs/cait_s24.py.

Command: python train.py --config=configs/cait_s24_384.py --config.data.data_dir=DIR \
  --config.init.weights=runs/cait_s24
Hardware and time: none recorded; not yet run to its end here.
Expected (Touvron et al., arXiv 2103.17239, without distillation, 384 pixels): 84.3 % top-1.
"""

from ml_collections import ConfigDict

from configs import cait_s24, higher_resolution


def get_config() -> ConfigDict:
    return higher_resolution.cait(cait_s24.get_config(), 384)
