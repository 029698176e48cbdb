"""What a config asks of augmentation: crops, transformations, mixing."""

import logging

from ml_collections import ConfigDict

from cait_jax.augment import mixup
from cait_jax.data.sampler import copies_in_a_group

_log = logging.getLogger(__name__)


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
