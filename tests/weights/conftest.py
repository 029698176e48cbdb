"""A small model with weights far from their start values, shared by the tests of loading and saving."""

import jax
import numpy as np
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


@pytest.fixture(scope="session")
def assert_same_bits():
    """Asserts that two trees have the same structure, dtypes, shapes and bits."""

    def check(found, expected):
        assert jax.tree.structure(found) == jax.tree.structure(expected)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

    return check
