"""Fine-tuning on a folder of images: a config chosen by the number of images.

| training images | trained | augmentation | batch | epochs |
|---|---|---|---|---|
| under 1,000, or under 10 a class | the last 4 blocks, after a head is fitted | crops, flips | 32 | 15 |
| up to 20,000 | all layers, layer decay 0.75 | RandAugment and erasing too | 64 | 30 |
| more | all layers | mixup and CutMix too | 128 | 20 |

A run has at least 100 steps, and more epochs for that where these are short. The settings for few images were
chosen on photographs (docs/results.md), the others are common ones.
"""

import dataclasses
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from cait_jax.data.folder import load_folder, read_layout
from cait_jax.data.image_files import existing_folder
from cait_jax.errors import UserError, nearest, setting, some
from cait_jax.evaluation.labels import read_labels
from cait_jax.models.cait import CaiT
from cait_jax.models.variants import VARIANTS
from cait_jax.models.zoo import create_model
from cait_jax.train.config import get_config
from cait_jax.weights.hub import find_released
from cait_jax.weights.hub_files import as_written, is_address
from cait_jax.weights.pretrained import load_pretrained, preprocessing

PARTS = ("all", "head", "two-phase", "lora")
"""What is trained: everything, the new head alone, a fitted head and then the last blocks too, or adapters."""

_FEW_IMAGES = 1_000
_FEW_PER_CLASS = 10
_MANY_IMAGES = 20_000
_MIN_STEPS = 100
_STEPS_BETWEEN_EVALUATIONS = 50
# Attributes that are the run's to choose, not the saved model's: they compute the same network in another way.
_NUMERICS = ("name", "dtype", "param_dtype", "precision", "remat", "attention", "stacked")


@dataclasses.dataclass(frozen=True)
class Photographs:
    """The splits of a folder: an absolute path, numbers of images, and the classes in the order of their labels.

    `eval_split` is the one for validation, else the one for testing.
    """

    directory: Path
    eval_split: str
    images: int
    eval_images: int
    class_names: tuple[str, ...]
    train_split: str = "train"

    @property
    def size(self) -> str:
        """`"few"`, `"middle"` or `"many"`: the row of this module's table."""
        if self.images < max(_FEW_IMAGES, _FEW_PER_CLASS * len(self.class_names)):
            return "few"
        return "middle" if self.images <= _MANY_IMAGES else "many"


def look_through(directory: str | Path) -> Photographs:
    """Finds the splits of a folder (see `load_folder`) and counts its images, of which none is opened.

    Without splits a tenth of the images, by the hash of their paths, is held out.

    Raises:
      UserError: there is no such folder, it has fewer than two classes, a class has no image to train on, or no
        image is held out.
    """
    folder = existing_folder(directory).absolute()
    layout = read_layout(folder)
    splits = dict(zip(layout.splits, layout.names, strict=True)) or {"train": "train", "val": "val"}
    beside = f"; beside it are {some(layout.beside)}, of which nothing says what they are for"
    if "train" not in splits:
        raise UserError(
            f"{folder} has {' and '.join(splits.values())} but no train to learn from"
            f"{beside if layout.beside else ''}: add a folder train with one folder of images a class"
        )
    held_out = next((splits[purpose] for purpose in ("val", "test") if purpose in splits), None)
    if held_out is None:
        raise UserError(
            f"{folder} has {splits['train']} but nothing to measure on"
            f"{beside if layout.beside else ''}: add a folder val, or give {folder / splits['train']} "
            "itself, of which a tenth is then kept for that"
        )
    training = load_folder(folder, splits["train"])
    names = training.class_names
    if len(names) < 2:
        raise UserError(
            f"{folder} has one class, {names[0]}, so there is nothing to tell apart: add a folder of "
            "images for each other class"
        )
    counts = np.bincount(read_labels(training), minlength=len(names))
    if not counts.all():
        unseen = some([names[index] for index in np.flatnonzero(counts == 0)])
        raise UserError(
            f"{folder} keeps every image of some classes for measuring, so they cannot be learnt: {unseen}; "
            "give them more images, or divide the folder into folders train and val"
        )
    measuring = load_folder(folder, held_out)
    return Photographs(folder, held_out, len(training), len(measuring), names, splits["train"])


def folder_config(
    photographs: Photographs | str | Path,
    model: str,
    *,
    weights: str | Path | None = None,
    what: str | None = None,
    epochs: float | None = None,
    batch_size: int | None = None,
    image_size: int | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    devices: int = 1,
) -> ConfigDict:
    """The config of a run that fine-tunes a model on a folder of images; the module's table has what is not given.

    Args:
      photographs: the folder, or what `look_through` found in it.
      model: a model's name, the directory of a saved model or of a training run, or `hf://NAMESPACE/NAME`.
      weights: instead of the model's own, as `cait_jax.load_pretrained` takes them.
      what: one of `PARTS`.
      epochs: of training; in two phases of the second.
      image_size: that of the model's own preprocessing by default.
      rank: of the adapters, with `what="lora"`; 8 by default.
      alpha: their products are scaled by `alpha / rank`; 16 by default.
      devices: that share a batch evenly.

    Returns:
      A config for `cait_jax.train.train`, with the model's own mean, deviation and crop, a new head, and no EMA:
      these runs are shorter than its time constant.

    Raises:
      UserError: the folder does not do (see `look_through`), the model or its weights do not exist or take no
        colour, or a number does not fit the folder.
    """
    if not isinstance(photographs, Photographs):
        photographs = look_through(photographs)
    size = photographs.size
    if what is None:
        what = "two-phase" if size == "few" else "all"
    if what not in PARTS:
        raise UserError(f"{setting('what', what)} is unknown; {nearest(what, PARTS)}")
    for name, value in {"rank": rank, "alpha": alpha}.items():
        if value is not None and what != "lora":
            raise UserError(
                f"{setting(name, value)} is for adapters: give {setting('what', 'lora')} too, or leave it out"
            )

    config = get_config()
    config.seed = seed
    network = _set_model(config, model, weights, image_size)
    config.data.name = str(photographs.directory)
    config.data.train_split = photographs.train_split
    config.data.eval_split = photographs.eval_split
    config.data.aug_repeats = 1
    config.data.workers = 0 if size == "few" else min(8, (os.cpu_count() or 1) // 2)

    config.batch_size = _batch_size(photographs, batch_size, devices)
    config.eval.batch_size = min(2 * config.batch_size, photographs.eval_images)
    steps_per_epoch = photographs.images / config.batch_size
    config.eval.every_epochs = float(
        max(1, math.ceil(_STEPS_BETWEEN_EVALUATIONS / steps_per_epoch))
    )
    config.checkpoint.every_steps = 500
    config.report.every_steps = 10 if size == "few" else 50
    config.report.predictions = 32
    if epochs is None:
        usual, least = {
            "head": (20, _MIN_STEPS),
            "two-phase": (15, _MIN_STEPS),
            "all": (20 if size == "many" else 30, _MIN_STEPS),
            "lora": (20, _MIN_STEPS),
        }[what]
        epochs = max(usual, math.ceil(least / steps_per_epoch))
    config.epochs = float(epochs)

    _set_augmentation(config, size)
    if what == "lora":
        _set_adapters(config, 8 if rank is None else rank, 16.0 if alpha is None else alpha)
    else:
        _set_optimizer(config, what, size, network.depth + network.class_depth)
    return config


def _set_model(
    config: ConfigDict, model: str, weights: str | Path | None, image_size: int | None
) -> Any:
    """Sets model, weights and preprocessing, and gives the network."""
    network: Any
    named = model in VARIANTS
    if named:
        network = create_model(model)
        config.model.name = model
    else:
        network, _ = load_pretrained(model)
    if not isinstance(network, CaiT):
        raise UserError(
            f"{model} is here to predict and to teach, not to be trained: its batch norms keep running "
            "averages; choose a transformer, such as cait_xxs24_224"
        )
    if named and weights is None:
        find_released(model)
        config.init.pretrained = True
    else:
        config.init.weights = as_written(model if weights is None else weights)
    config.init.reset_head = True
    if not named:
        config.model.update(_as_settings(network, config.model))

    settled = model
    if weights is not None and (Path(weights).is_dir() or is_address(weights)):
        settled = as_written(weights)
    prepare = preprocessing(settled, image_size=image_size)
    if prepare.channels != 3 or (not named and network.in_channels != 3):
        raise UserError(
            f"{settled} takes images without colour, and folders are read in colour: choose a model of 3 "
            "channels, such as cait_xxs24_224"
        )
    height, width = prepare.image_size
    with config.ignore_type():  # one number where it is square
        config.image_size = height if height == width else (height, width)
    config.data.mean, config.data.std = prepare.mean, prepare.std
    config.eval.crop_pct = prepare.crop_pct
    return network


def _as_settings(network: CaiT, keys: ConfigDict) -> dict[str, Any]:
    """A network as keys of a config: the named model that is most like it, and what differs from that."""

    def differences(name: str) -> dict[str, Any]:
        named = create_model(name)
        return {
            key: getattr(network, key)
            for key in keys
            if key not in _NUMERICS
            and hasattr(network, key)
            and getattr(network, key) != getattr(named, key)
        }

    name, changed = min(
        (
            (name, differences(name))
            for name, variant in VARIANTS.items()
            if variant.family == type(network).__name__
        ),
        key=lambda candidate: len(candidate[1]),
    )
    if "class_token" in changed:  # a block's number is a word among words
        changed["class_token"] = str(changed["class_token"])
    return {"name": name, **changed}


def _batch_size(photographs: Photographs, wanted: int | None, devices: int) -> int:
    images = photographs.images
    if images < devices:
        raise UserError(
            f"{photographs.directory} has {images} images to learn from, fewer than the {devices} devices that "
            "share them: add images, or use fewer devices"
        )
    usual = {"few": 32, "middle": 64, "many": 128}[photographs.size] if wanted is None else wanted
    fitting = max(1, min(usual, images) // devices) * devices
    if wanted not in (None, fitting):
        raise UserError(
            f"a batch of {wanted} does not fit {images} images and {devices} device{'s' * (devices > 1)}: it must "
            f"be a multiple of the devices and at most the images, such as {setting('batch_size', fitting)}"
        )
    return fitting


def _set_augmentation(config: ConfigDict, size: str) -> None:
    augment = config.augment
    if size == "few":
        augment.scale = (0.35, 1.0)
        augment.rand_augment = ""
        augment.reprob = 0.0
    if size != "many":
        augment.mixup = augment.cutmix = 0.0


def _set_optimizer(config: ConfigDict, what: str, size: str, blocks: int) -> None:
    optimizer = config.optimizer
    optimizer.ema_decay = 0.0
    optimizer.grad_clip_norm = 1.0
    if what == "all":
        # Rates for a batch of 512, far below those of training from scratch.
        optimizer.learning_rate = 2e-4 if size == "many" else 1e-3
        optimizer.layer_decay = 1.0 if size == "many" else 0.75
        optimizer.warmup_epochs = config.epochs / 10
        optimizer.final_learning_rate = 1e-6
        return
    optimizer.weight_decay = 0.01
    optimizer.reference_batch = 0
    optimizer.warmup_epochs = 0.0
    if what == "head":
        optimizer.train = "head"
        optimizer.learning_rate = 1e-3
        return
    config.init.fit_head = True
    config.model.stacked = False  # the backward pass ends at the first block that is trained
    optimizer.train = str(min(4, blocks))
    optimizer.learning_rate, optimizer.final_learning_rate = 1e-4, 1e-6
    optimizer.warmup_epochs = config.epochs / 10


def _set_adapters(config: ConfigDict, rank: int, alpha: float) -> None:
    config.lora.rank, config.lora.alpha = rank, float(alpha)
    config.init.fit_head = True
    optimizer = config.optimizer
    optimizer.ema_decay = 0.0
    optimizer.grad_clip_norm = 1.0
    optimizer.weight_decay = 0.01
    optimizer.learning_rate, optimizer.final_learning_rate = 2e-4, 1e-6
    optimizer.reference_batch = 0
    optimizer.warmup_epochs = config.epochs / 10
