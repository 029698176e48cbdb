"""CaiT's recipe for ImageNet-1k (Touvron et al., arXiv 2103.17239), and what DeiT's shares with it.

docs/recipe.md compares it with the authors' code and says what is assumed of higher resolutions and distillation
(the paper's names with an upsilon); `cait recipes` lists the accuracies to expect.
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
