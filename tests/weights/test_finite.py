"""Weights that are not numbers are refused by every loader and every writer, with their name and count."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from trees import random_params

from cait_jax import create_model, export_timm, load_pretrained, save_pretrained
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.errors import UserError
from cait_jax.train.average import mean_params
from cait_jax.weights.finite import check_finite

NAME = "cait_nano4_patch4_8"
SHAPE = {"depth": 1, "width": 16, "num_heads": 2, "num_classes": 3}


@pytest.fixture
def network():
    model = create_model(NAME, **SHAPE)
    return model, {"params": random_params(model)}


@pytest.mark.parametrize("kind", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_the_weight_is_named_with_how_many(kind):
    weights = {"a": np.ones(3, kind), "count": np.ones(2, np.int64), "b": np.ones((2, 3), kind)}
    check_finite(weights)
    weights["b"][1, 0], weights["b"][0, 2] = np.nan, -np.inf
    with pytest.raises(UserError, match=r"^b has 2 of 6 numbers that are NaN or infinite:"):
        check_finite(weights)
    weights["a"][0] = np.inf
    with pytest.raises(UserError, match=r"^a has 1 of 3 .* infinite, and so have 1 more:"):
        check_finite(weights)


def test_a_dtype_that_would_overflow_is_refused():
    weights = {"a": np.array([1.0, 1e39])}
    with pytest.raises(UserError, match="a has 1 numbers that float32 cannot hold"):
        check_finite(weights, np.float32)
    check_finite(weights, np.float64)
    with pytest.raises(UserError, match="a has 1 numbers that bfloat16 cannot hold"):
        check_finite(weights, ml_dtypes.bfloat16)


def test_every_loader_refuses_them(network, tmp_path):
    model, variables = network
    save_pretrained(tmp_path / "saved", model, variables)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    weights["blocks.0.mlp.fc1.weight"][3, 5] = np.nan
    save_file(weights, tmp_path / "w.safetensors")
    sentence = r"blocks\.0\.mlp\.fc1\.weight has 1 of 1,024 numbers that are NaN"
    for source in (NAME, tmp_path / "saved"):
        with pytest.raises(UserError, match=rf"w\.safetensors: {sentence}"):
            load_pretrained(source, weights=tmp_path / "w.safetensors", **SHAPE)

    # A directory that another program made, its sum right.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cait_jax.weights.description.check_finite", lambda weights: None)
        bad = jax.tree.map(jnp.asarray, variables)
        bad["params"]["head"]["bias"] = bad["params"]["head"]["bias"].at[1].set(jnp.inf)
        save_pretrained(tmp_path / "bad", model, bad)
    with pytest.raises(UserError, match=r"bad: head\.bias has 1 of 3 numbers"):
        load_pretrained(tmp_path / "bad")

    # A run whose parameters overflowed.
    config = {"image_size": 8, "model": {"name": NAME, "depth": 1, "width": 16, "num_heads": 2}}
    with Checkpoints(tmp_path / "run" / "checkpoints") as checkpoints:
        meta = {"config": config, "class_names": ["a", "b", "c"], "channels": 1}
        checkpoints.save(1, {"params": bad["params"]}, meta)
    with pytest.raises(UserError, match=r"head\.bias has 1 of 3 numbers"):
        load_pretrained(tmp_path / "run")


def test_no_writer_writes_them(network, tmp_path):
    model, variables = network
    huge = jax.tree.map(lambda leaf: np.full(leaf.shape, 3e38, leaf.dtype), variables)
    infinite = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), huge)
    for write in (save_pretrained, export_timm):
        with pytest.raises(UserError, match="numbers that are NaN or infinite, and so have"):
            write(tmp_path / "new", model, infinite)
    with pytest.raises(UserError, match="numbers that are NaN or infinite"):
        export_timm(tmp_path / "w.safetensors", model, infinite)
    assert not list(tmp_path.iterdir())
    # A mean is summed in float64, so it overflows only where its parts did.
    mean = mean_params([huge, huge])
    save_pretrained(tmp_path / "mean", model, mean)
