"""Fine-tuning at a higher resolution, after training at 224 pixels.

CaiT. The author gave numbers once, for M48 at 448 pixels, distilled (facebookresearch/deit, issue 108): batch
256, rate 5e-6, 60 epochs, weight decay 0.05, 5 epochs of warm-up, drop path 0.3, repeated augmentation,
smoothing, RandAugment, erasing, mixup and CutMix as before, decay-epochs 10 and decay-rate 0.5.

Assumed here:
- The same numbers for all models and for 384 pixels; drop path stays that of each model, but for M48.
- 5e-6 is the rate itself, not one for a batch of 512.
- The rate is constant after the warm-up. The last two of his numbers belong to a step schedule, which would
  end at 1.6e-7: `--config.optimizer.schedule=step --config.optimizer.decay_epochs=10
  --config.optimizer.decay_rate=0.5`. With the code's default, a cosine to 1e-5, they are not read, and the
  rate would rise.

DeiT-B at 384 pixels is the command in its README_deit.md: batch 512, rate and min-lr 5e-6, 30 epochs, weight
decay 1e-8, all else by default.
"""

from ml_collections import ConfigDict


def cait(config: ConfigDict, image_size: int) -> ConfigDict:
    """Turns a recipe of CaiT into its fine-tuning at another resolution.

    Args:
      config: the recipe of the run to go on from; changed in place.
      image_size: side in pixels.

    Returns:
      The config. Its start, `init.weights`, is the recipe's own workdir, which must exist.
    """
    config.batch_size = 256
    config.epochs = 60.0
    return _constant_rate(config, image_size)


def deit(config: ConfigDict, image_size: int) -> ConfigDict:
    """Turns a recipe of DeiT into its fine-tuning at another resolution; see `cait`."""
    config.batch_size = 512
    config.epochs = 30.0
    config.optimizer.weight_decay = 1e-8
    return _constant_rate(config, image_size)


def _constant_rate(config: ConfigDict, image_size: int) -> ConfigDict:
    config.image_size = image_size
    config.init.weights = f"runs/{config.model.name}"
    config.optimizer.learning_rate = 5e-6
    config.optimizer.reference_batch = 0
    config.optimizer.final_learning_rate = 5e-6
    return config
