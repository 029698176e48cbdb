"""A small model with weights far from their start values, shared by the tests of loading and saving."""

import pytest
from trees import random_params

from cait_jax import create_model

SMALL = {"depth": 2, "num_classes": 3, "width": 16, "num_heads": 2}


@pytest.fixture(scope="session")
def model():
    return create_model("cait_nano4_patch4_8", **SMALL)


@pytest.fixture(scope="session")
def variables(model):
    return {"params": random_params(model)}
