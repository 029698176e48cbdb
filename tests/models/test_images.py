"""What is not a batch of normalised images is refused with the call that prepares it."""

import numpy as np
import pytest

from cait_jax.models.layers import check_images

SIZE, CHANNELS = (8, 12), 3


@pytest.mark.parametrize(
    ("shape", "dtype", "sentence"),
    [
        ((2, 8, 12, 3), np.uint8, r"images of uint8 are not normalised: .*cait_jax\.preprocessing\(MODEL\)"),
        ((2, 8, 12, 3), np.int32, "images of int32 are not normalised"),
        ((8, 12, 3), np.float32, r"no batch axis: give images\[None\] to a model for \(batch, 8, 12, 3\)"),
        ((2, 3, 8, 12), np.float32, r"channels first: give jnp\.moveaxis\(images, 1, -1\) to a model for"),
        ((2, 8, 8, 3), np.float32, "do not fit a model for .*: resize them, or create the model with"),
        ((2, 8, 12, 1), np.float32, "do not fit a model for"),
        ((12, 3), np.float32, "do not fit a model for"),
        ((1, 2, 8, 12, 3), np.float32, "do not fit a model for"),
    ],
)  # fmt: skip
def test_each_mistake_has_its_own_sentence(shape, dtype, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_images(np.zeros(shape, dtype), SIZE, CHANNELS)


def test_what_fits_passes():
    check_images(np.zeros((2, 8, 12, 3), np.float16), SIZE, CHANNELS)
    check_images(np.zeros((2, 40, 50, 3), np.float32), None, CHANNELS)
