"""The affine warp against Pillow's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from cait_jax.augment.randaugment import warp

FILL = (124, 116, 104)
IDENTITY = (1, 0, 0, 0, 1, 0)
warp_jitted = jax.jit(warp, static_argnums=2)


def noise(channels):
    return np.random.default_rng(0).integers(0, 256, (21, 27, channels), dtype=np.uint8)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(
    "inverse",
    [
        IDENTITY,
        (1, 0.27, 0, 0, 1, 0),
        (1, 0, -4.7, 0, 1, 3.2),
        (0.9, 0.4, -2.0, -0.35, 1.1, 3.0),
        (0.5, 0, 0, 0, 0.5, 0),
        (1, 0, 1000, 0, 1, 0),
    ],
)
def test_agrees_with_pillow_to_a_level(inverse, channels):
    image = noise(channels)
    fill = FILL if channels == 3 else 117  # 0.299 * 124 + 0.587 * 116 + 0.114 * 104
    pillow = Image.fromarray(image if channels == 3 else image[..., 0])
    expected = pillow.transform(
        pillow.size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC, fillcolor=fill
    )
    found = warp_jitted(image, jnp.array(inverse, jnp.float32).reshape(2, 3), FILL)
    difference = np.abs(np.asarray(found).astype(int) - np.asarray(expected).reshape(found.shape))
    assert difference.max() <= 1
    assert (difference > 0).mean() < 0.02
    if inverse == IDENTITY:
        np.testing.assert_array_equal(found, image)
