"""CaiT's recipe for ImageNet-1k (Touvron et al., arXiv 2103.17239), and what DeiT's shares with it.

docs/recipe.md compares it with the authors' code; `cait recipes` lists the accuracies to expect.

A higher resolution. CaiT's author gave numbers once, for M48 at 448 pixels, distilled (facebookresearch/deit,
issue 108): batch 256, rate 5e-6, 60 epochs, weight decay 0.05, 5 epochs of warm-up, drop path 0.3, repeated
augmentation, smoothing, RandAugment, erasing, mixup and CutMix as before, decay-epochs 10 and decay-rate 0.5.
Assumed here:

- The same numbers for all models and for 384 pixels; drop path stays that of each model, but for M48.
- 5e-6 is the rate itself, not one for a batch of 512.
- The rate is constant after the warm-up. The last two of his numbers belong to a step schedule, which would end at
  1.6e-7: `--config.optimizer.schedule=step --config.optimizer.decay_epochs=10 --config.optimizer.decay_rate=0.5`.
  With the code's default, a cosine to 1e-5, they are not read, and the rate would rise.

Distillation, the paper's names with an upsilon: label and teacher share the one head, half of the loss each. That
is an assumption: no public code of it was found.
"""

from collections.abc import Callable

from ml_collections import ConfigDict

from cait_jax.train.config import check_argument, default_workdir
from configs import common


def recipe(name: str) -> ConfigDict:
    """The recipe for a model of `cait_jax.list_models()`."""
    config = common.get_config()
    config.model.name = name
    config.model.dtype = "bfloat16"  # of activations; parameters, optimiser and EMA are float32
    config.model.remat = "elementwise"
    config.augment.mix_rows = 64  # the batch of a process in the authors' runs of 16 x 64
    config.optimizer.per_epoch = True  # as the published code
    return config


def cait(name: str) -> Callable[..., ConfigDict]:
    """The `get_config` of a CaiT; its argument asks for the higher resolution, distillation or both."""
    pixels = 448 if name == "cait_m48" else 384

    def get_config(argument: str = "") -> ConfigDict:
        check_argument(name, argument, ("", f"{pixels}", "distilled", f"{pixels},distilled"))
        config = recipe(name)
        if argument.endswith("distilled"):
            config.distill.kind = "hard"
        if argument.startswith(f"{pixels}"):
            higher_resolution(config, pixels, f"{name}.py:{argument[4:]}")
            config.batch_size, config.epochs = 256, 60.0
            if name == "cait_m48":
                config.model.drop_path_rate = 0.3  # 0.4 at 224 pixels
        return config

    return get_config


def higher_resolution(config: ConfigDict, pixels: int, start: str) -> None:
    """Turns a recipe into fine-tuning at `pixels` with a constant rate, from the run of the recipe `start`."""
    config.image_size = pixels
    config.init.weights = str(default_workdir(start))
    config.optimizer.learning_rate = 5e-6
    config.optimizer.reference_batch = 0
    config.optimizer.final_learning_rate = 5e-6
