"""What a config asks of augmentation: crops, transformations, mixing."""

import functools
import logging
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cait_jax.data.augment import Augmentation
from cait_jax.data.mix import Mixing
from cait_jax.data.order import copies_in_a_group
from cait_jax.data.randaugment import parse_policy
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


def augmentation_of(config: ConfigDict) -> Augmentation:
    """What is drawn for each image in the jitted step."""
    augment = config.augment
    policy = augment.rand_augment
    return Augmentation(
        flip=augment.flip,
        pad_crop=augment.pad_crop,
        rotate=augment.rotate,
        zoom=augment.zoom,
        shear=augment.shear,
        translate=augment.translate,
        rand_augment=parse_policy(policy) if policy else None,
        three_augment=augment.three_augment,
        color_jitter=augment.color_jitter,
    )


def mixing_of(config: ConfigDict) -> Mixing:
    """How images of a batch are mixed."""
    augment = config.augment
    return Mixing(
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        probability=augment.mix_probability,
        switch=augment.mix_switch,
        rows=augment.mix_rows,
    )


def warn_of_shared_draws(config: ConfigDict) -> None:
    """Logs how many rows are mixed by one draw with another copy of their image."""
    if not mixing_of(config).enabled:
        return
    rows, repeats = config.augment.mix_rows, config.data.repeats
    shared = copies_in_a_group(config.batch_size, rows, repeats)
    if shared:
        _log.warning(
            "%d of the %d rows of a batch share their mixup or CutMix draw with another copy of their image: "
            "data.repeats=%d needs as many groups, and augment.mix_rows=%d makes %d",
            shared,
            config.batch_size,
            repeats,
            rows,
            -(-config.batch_size // (rows or config.batch_size)),
        )
