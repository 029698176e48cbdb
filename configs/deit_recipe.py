"""DeiT's recipe (Touvron et al., arXiv 2012.12877, table 9), which CaiT's follows."""

from ml_collections import ConfigDict

from configs import imagenet


def train(name: str) -> ConfigDict:
    """The recipe for one of DeiT's models.

    Drop path, 0.1 in the last block and growing linearly up to it, comes with the model.

    Args:
      name: such as `"deit_small"`; a distilled model has a second head, for the teacher.
    """
    config = imagenet.recipe(name)
    config.epochs = 300.0
    config.eval.crop_pct = 0.875  # 224 of 256 pixels
    return config


def train_distilled(name: str) -> ConfigDict:
    """The recipe with hard distillation from RegNetY-16GF (section 4), one head for each of two teachers."""
    config = train(name)
    config.distill.kind = "hard"
    return config
