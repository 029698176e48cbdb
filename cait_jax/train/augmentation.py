"""What a config asks of augmentation: crops, transformations, mixing."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cait_jax.augment import mixup
from cait_jax.data.order import copies_in_a_group
from cait_jax.data.sources import InMemory, Split
from cait_jax.errors import UserError

_log = logging.getLogger(__name__)


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
        scale, ratio = tuple(augment.scale), tuple(augment.ratio)
        return functools.partial(
            decode.random_resized_crop, scale=scale, ratio=ratio, resize=resize
        )
    if isinstance(split, InMemory):
        raise UserError(
            "--config.augment.simple_crop crops images as they are decoded, and those of "
            f"{config.data.name} are in memory: set it to False and use --config.augment.pad_crop=4"
        )
    return functools.partial(decode.simple_random_crop, resize=resize)


def warn_of_shared_draws(config: ConfigDict) -> None:
    """Logs how many rows are mixed by one draw with another copy of their image."""
    if not mixup.from_config(config).enabled:
        return
    rows, repeats = config.augment.mix_rows, config.data.aug_repeats
    shared = copies_in_a_group(config.batch_size, rows, repeats)
    if shared:
        _log.warning(
            "%d of the %d rows of a batch share their mixup or CutMix draw with another copy of their image: "
            "data.aug_repeats=%d needs as many groups, and augment.mix_rows=%d makes %d",
            shared,
            config.batch_size,
            repeats,
            rows,
            -(-config.batch_size // (rows or config.batch_size)),
        )
