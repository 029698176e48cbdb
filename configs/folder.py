"""Fine-tuning on a folder of photographs, one folder a class; settings by how many there are.

Command: python train.py --config=configs/folder.py:DIR [--config.model.name=cait_s24_224]
Hardware and time: as long as DIR is large; few images take a few hundred steps.
The same without a config, for any model, saved model or run: cait finetune DIR --model NAME

The rule for the settings is in cait_jax/train/finetune.py.
"""

from pathlib import Path

from ml_collections import ConfigDict

from cait_jax.train.finetune import folder_config
from configs import common

MODEL = "cait_xxs24_224"


def get_config(directory: str = "photographs") -> ConfigDict:
    if Path(directory).expanduser().is_dir():
        return folder_config(directory, MODEL)
    # As other recipes load without their data: the keys can be looked at, and training says what is missing.
    config = common.get_config()
    config.model.name = MODEL
    config.data.name = str(Path(directory).expanduser().absolute())
    return config
