"""The mapping of timm's names is strict. Its numbers are held in tests/models/test_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model
from cait_jax.weights.timm_names import from_timm, to_timm

TENSORS = {"cait_xxs24": 476, "cait_xxs36": 692, "cait_m48": 908}


@pytest.fixture(scope="module")
def model():
    return create_model(
        "cait_nano4_patch4_8", depth=2, num_classes=3, patch_size=2, width=96, num_heads=2
    )


@pytest.fixture(scope="module")
def weights(model):
    return to_timm({"params": random_params(model)})


@pytest.mark.parametrize("name", sorted(TENSORS))
def test_number_of_published_tensors(name):
    model = create_model(name, image_size=32)
    template = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))["params"]
    params = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), template)
    weights = to_timm({"params": params})
    assert len(weights) == TENSORS[name]


def test_published_shapes(weights):
    assert weights["patch_embed.proj.weight"].shape == (96, 1, 2, 2)
    assert weights["blocks.1.attn.qkv.weight"].shape == (288, 96)
    assert weights["blocks.0.gamma_2"].shape == (96,)
    assert weights["blocks_token_only.1.mlp.fc1.weight"].shape == (384, 96)
    assert weights["head.weight"].shape == (3, 96)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda w: w.pop("blocks.1.gamma_1"), r"1 missing \(blocks.1.gamma_1\)"),
        (lambda w: w.update(dist_token=np.zeros(3)), r"1 left over \(dist_token\)"),
        (
            lambda w: w.update({"head.weight": np.zeros((5, 96))}),
            r"1 of another shape \(head.weight is \(5, 96\), not \(3, 96\)\)",
        ),
        (
            lambda w: w.update({"patch_embed.proj.weight": np.zeros((96, 3, 2, 2))}),
            r"patch_embed.proj.weight is \(96, 3, 2, 2\), not \(96, 1, 2, 2\)",
        ),
        (lambda w: [w.pop(k) for k in list(w) if "attn" in k], r"32 missing .* and 28 more"),
        (
            lambda w: w.update({k: (10 * v).astype(np.int8) for k, v in w.items()}),
            r"^blocks\.0\.attn\.proj\.bias is int8, .*: choose weights in floating point$",
        ),
    ],
)
def test_what_does_not_fit_is_named(model, weights, edit, message):
    edited = dict(weights)
    edit(edited)
    with pytest.raises(UserError, match=message):
        from_timm(edited, model)


def test_parameters_come_in_the_models_param_dtype(model, weights):
    params = from_timm(weights, model.clone(param_dtype=jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
