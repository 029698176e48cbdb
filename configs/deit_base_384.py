r"""DeiT-B on ImageNet-1k, fine-tuned at 384 pixels after configs/deit_base.py.

Command: python train.py --config=configs/deit_base_384.py --config.data.data_dir=DIR \
  --config.init.weights=runs/deit_base
Hardware and time: none recorded; not yet run to its end here.
Expected (facebookresearch/deit, README_deit.md, 384 pixels): 82.9 % top-1.
"""

from ml_collections import ConfigDict

from configs import deit_base, higher_resolution


def get_config() -> ConfigDict:
    return higher_resolution.deit(deit_base.get_config(), 384)
