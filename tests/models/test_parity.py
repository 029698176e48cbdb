"""A small CaiT against numbers recorded from the published code (fixtures/cait_small.npz)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from marks import slow
from trees import unstack_blocks

from cait_jax.models import cait
from cait_jax.models.cait import CaiT
from cait_jax.weights.timm_names import from_timm, to_timm

FIXTURE = Path(__file__).parents[1] / "fixtures" / "cait_small.npz"
LABELS = jnp.array([0, 3])


@pytest.fixture(scope="module")
def recorded():
    with np.load(FIXTURE) as file:
        return dict(file)


def small_cait(stacked=True, **overrides):
    return CaiT(
        image_size=(48, 80),
        width=96,
        depth=3,
        num_heads=4,
        num_classes=7,
        precision="highest",
        stacked=stacked,
        **overrides,
    )


def published(recorded, kind):
    prefix = f"{kind}/"
    return {name[len(prefix) :]: a for name, a in recorded.items() if name.startswith(prefix)}


def logits_error(recorded, params, model=None):
    logits = (model or small_cait()).apply({"params": params}, recorded["image"])
    return float(jnp.abs(logits - recorded["logits"]).max())


def stages(model, params, image):
    """The output of every module, under the published names."""
    _, state = model.apply(
        {"params": params}, image, capture_intermediates=True, mutable=["intermediates"]
    )
    found = {}
    for path, value in jax.tree_util.tree_leaves_with_path(state["intermediates"]):
        keys = [key.key for key in path if hasattr(key, "key")]
        if keys[-1] == "__call__":
            found[".".join(keys[:-1])] = value
    return found


@pytest.mark.parametrize("stacked", [True, False])
def test_every_stage_and_the_logits_agree(recorded, stacked):
    model = small_cait(stacked)
    params = from_timm(published(recorded, "weight"), model)["params"]
    found = stages(model, params, recorded["image"])
    ours = {
        "patch_embed": found["patch_embed"],
        "pos_drop": found["pos_drop"],
        "blocks": found["blocks"][-1] if stacked else found["blocks_2"],
        "head": found["head"],
        "norm": found["norm"],
        "patch_embed.proj": found["patch_embed.proj"].transpose(0, 3, 1, 2),
    }
    for part in ("norm1", "attn", "norm2", "mlp", ""):
        for i in range(3):
            dot = "." if part else ""
            ours[f"blocks.{i}{dot}{part}"] = (
                found[f"blocks{dot}{part}"][i] if stacked else found[f"blocks_{i}{dot}{part}"]
            )
        for j in range(2):
            ours[f"blocks_token_only.{j}{dot}{part}"] = found[f"blocks_token_only_{j}{dot}{part}"]

    theirs = published(recorded, "stage")
    same_array = {"patch_embed.norm", "head_drop"}  # identities in the published code
    assert set(ours) == set(theirs) - same_array
    for name, value in ours.items():
        expected = theirs[name][:, :1] if name == "norm" else theirs[name]
        np.testing.assert_allclose(value, expected, rtol=0, atol=1e-5, err_msg=name)
    assert logits_error(recorded, params, model) < 1e-5


@pytest.mark.parametrize("remat", ["none", *map(slow, ("elementwise", "attention", "block"))])
def test_loss_and_every_gradient_agree(recorded, remat):
    model = small_cait(remat=remat)
    params = from_timm(published(recorded, "weight"), model)["params"]

    def loss_fn(params):
        logits = model.apply({"params": params}, recorded["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, LABELS).mean()

    loss, gradients = jax.value_and_grad(loss_fn)(params)
    assert abs(float(loss) - float(recorded["loss"])) < 1e-5
    ours, theirs = to_timm({"params": gradients}), published(recorded, "grad")
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        tolerance = 1e-5 * np.abs(expected).max() + 1e-7
        np.testing.assert_allclose(ours[name], expected, rtol=0, atol=tolerance, err_msg=name)


def test_names_map_both_ways_bit_for_bit(recorded):
    weights = published(recorded, "weight")
    for stacked in (True, False):
        back = to_timm(from_timm(weights, small_cait(stacked)))
        assert set(back) == set(weights)
        for name, array in weights.items():
            np.testing.assert_array_equal(back[name], array, err_msg=name)


def test_stacked_and_unrolled_give_equal_outputs(recorded):
    params = from_timm(published(recorded, "weight"), small_cait())["params"]
    image = recorded["image"]
    stacked = small_cait().apply({"params": params}, image)
    unrolled = small_cait(stacked=False).apply({"params": unstack_blocks(params)}, image)
    np.testing.assert_allclose(stacked, unrolled, rtol=0, atol=2e-6)


# What follows shows that the comparison can fail: each of these mistakes must exceed its tolerance.


def test_a_perturbed_weight_fails(recorded):
    weights = published(recorded, "weight")
    weights["blocks.1.mlp.fc1.weight"] = weights["blocks.1.mlp.fc1.weight"].copy()
    weights["blocks.1.mlp.fc1.weight"][5, 7] += 0.1
    assert logits_error(recorded, from_timm(weights, small_cait())["params"]) > 1e-5


@pytest.mark.parametrize("mixing", ["proj_l", "proj_w"])
def test_an_untransposed_head_mixing_fails(recorded, mixing):
    weights = published(recorded, "weight")
    name = f"blocks.0.attn.{mixing}.weight"
    weights[name] = weights[name].T
    assert logits_error(recorded, from_timm(weights, small_cait())["params"]) > 1e-5


def test_a_tanh_gelu_fails(recorded, monkeypatch):
    params = from_timm(published(recorded, "weight"), small_cait())["params"]
    monkeypatch.setattr(cait, "gelu", functools.partial(nn.gelu, approximate=True))
    assert logits_error(recorded, params) > 1e-5


def test_an_epsilon_of_1e_5_fails(recorded, monkeypatch):
    params = from_timm(published(recorded, "weight"), small_cait())["params"]

    def norm(*, name, **dtypes):
        return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name, **dtypes)

    monkeypatch.setattr(cait, "LayerNorm", norm)
    assert logits_error(recorded, params) > 1e-5
