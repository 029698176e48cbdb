"""Fine-tuning at a higher resolution, as the paper's recipes do after 224 pixels."""

from ml_collections import ConfigDict


def at(config: ConfigDict, image_size: int) -> ConfigDict:
    """Turns a recipe into its fine-tuning at another resolution.

    The numbers are the author's for M48 at 448 pixels; augmentation, losses and drop path stay as they are. The
    rate is constant after the warm-up: the default end of the cosine would lie above its peak.

    Args:
      config: the recipe of the run to go on from; changed in place.
      image_size: side in pixels.

    Returns:
      The config. Its start, `init.weights`, is the recipe's own workdir; it must be there.
    """
    config.image_size = image_size
    config.batch_size = 256
    config.epochs = 60.0
    config.init.weights = f"runs/{config.model.name}"
    config.optimizer.learning_rate = 5e-6
    config.optimizer.reference_batch = 0
    config.optimizer.final_learning_rate = 5e-6
    return config
