"""Small networks of every kind that is exported, with drawn parameters."""

import functools

import jax
import numpy as np
from trees import random_params

from cait_jax import Preprocessing, create_model

SMALL = {"width": 16, "depth": 2, "num_heads": 2, "image_size": 32, "num_classes": 5}
NETWORKS = {
    "cait": ("cait_xxs24", {}),
    "unstacked": ("cait_xxs24", {"stacked": False}),
    "rezero": ("cait_xxs24", {"residual": "rezero", "block_norm": False}),
    "late": ("cait_xxs24", {"class_token": 1, "stacked": False}),
    "vit": ("vit_tiny", {}),
    "distilled": ("deit_tiny_distilled", {}),
    "deit3": ("deit3_small_patch16_224", {}),
    "mae": ("vit_base_patch16_224.mae", {}),
    "registers": ("vit_small_patch14_reg4_dinov2.lvd142m", {"image_size": 28}),
    "swiglu": ("vit_giant_patch14_dinov2.lvd142m", {"image_size": 28, "mlp_ratio": 4.0}),
    "mean": ("vit_tiny", {"class_token": "mean"}),
    "grey": ("cait_xxs24", {"in_channels": 1}),
    "headless": ("vit_tiny", {"num_classes": 0}),
    "regnet": ("regnety_160", {"w0": 8, "depth": 4, "group_width": 8}),
}
SETTINGS = {"crop_pct": 0.9, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}


@functools.cache
def network(name):
    """(model, variables, preprocessing)."""
    base, attributes = NETWORKS[name]
    usual = {} if name == "regnet" else SMALL
    given = {"image_size": 32, "num_classes": 5, **usual, **attributes}
    model = create_model(base, **given)
    if name == "regnet":
        images = np.zeros((1, 32, 32, 3), np.float32)
        variables = jax.jit(model.init)(jax.random.key(0), images)
    else:
        variables = {"params": random_params(model)}
    one = {key: value[:1] for key, value in SETTINGS.items() if key != "crop_pct"}
    settings = SETTINGS | (one if model.in_channels == 1 else {})
    return model, variables, Preprocessing(model.image_size, channels=model.in_channels, **settings)


def images(name, number=3):
    """Normalised images of one network."""
    model = network(name)[0]
    shape = (number, *model.image_size, model.in_channels)
    return np.random.default_rng(1).standard_normal(shape, np.float32)
