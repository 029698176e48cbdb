"""A saved model with named classes, and photographs to show it."""

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from trees import random_params

from cait_jax import create_model, save_pretrained

CLASSES = ("n01440764", "sparrow", "teapot")


@pytest.fixture(scope="session")
def network():
    """(model, variables): 8x8 colour images, three classes, one block."""
    model = create_model("cait_nano4_patch4_8", depth=1, in_channels=3, num_classes=3)
    params = random_params(model)
    params["head"]["kernel"] = 0.1 * jnp.asarray(params["head"]["kernel"])
    return model, {"params": params}


@pytest.fixture(scope="session")
def saved(network, tmp_path_factory):
    """The directory of `save_pretrained`."""
    directory = tmp_path_factory.mktemp("saved") / "small"
    settings = {
        "image_size": [8, 8],
        "crop_pct": 0.9,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.3, 0.4],
        "channels": 3,
    }
    save_pretrained(directory, *network, label_names=CLASSES, preprocessing=settings)
    return directory


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Seven pictures and a broken one, in `root/CLASS/`."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for i in range(7):
        path = root / CLASSES[i % 3] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (12 + i, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    (root / "teapot" / "broken.png").write_bytes(b"not a picture at all")
    return root
