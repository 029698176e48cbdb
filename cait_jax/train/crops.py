"""The random crop of a run's encoded images."""

import functools
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cait_jax.data.sources import InMemory, Split
from cait_jax.errors import UserError


def training_crop(config: ConfigDict, split: Split) -> Callable[..., Any]:
    """The crop that `train_batches` takes.

    Args:
      config: as `cait_jax/train/defaults.py` describes it.
      split: the training examples.

    Raises:
      UserError: images in memory are asked to be cropped as they are decoded.
    """
    from cait_jax.data import decode

    augment, resize = config.augment, config.data.resize
    if not augment.simple_crop:
        scale, ratio = tuple(augment.crop_area), tuple(augment.crop_aspect)
        return functools.partial(
            decode.random_resized_crop, scale=scale, ratio=ratio, resize=resize
        )
    if isinstance(split, InMemory):
        raise UserError(
            "--config.augment.simple_crop crops images as they are decoded, and those of "
            f"{config.data.name} are in memory: set it to False and use --config.augment.pad_crop=4"
        )
    return functools.partial(decode.simple_random_crop, resize=resize)
