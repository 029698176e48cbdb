"""Fine-tuning on a folder of photographs, one folder a class: `folder.py:DIR`, settings by how many there are.

The same without a config, for any model, saved model or run: `cait finetune DIR --model NAME`. The rule for the
settings is in `cait_jax/train/finetune.py`.
"""

from pathlib import Path

from ml_collections import ConfigDict

from cait_jax.train.finetune import folder_config


def get_config(directory: str) -> ConfigDict:
    return folder_config(Path(directory).expanduser(), "cait_xxs24_224")
