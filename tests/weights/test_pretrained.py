"""Weights from anywhere fill the model that was asked for, whole or not at all."""

import logging

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file
from trees import assert_same_bits

from cait_jax import UserError
from cait_jax.weights import pretrained
from cait_jax.weights.hub import find_released
from cait_jax.weights.pretrained import load_pretrained, load_settings, save_pretrained
from cait_jax.weights.state_dicts import write_safetensors
from cait_jax.weights.timm_names import to_timm

NAME = "cait_nano4_patch4_8"
SHAPE = {"depth": 2, "width": 16, "num_heads": 2}


@pytest.fixture
def file(tmp_path, variables):
    path = tmp_path / "w.safetensors"
    write_safetensors(path, to_timm(variables))
    return path


def test_a_file_for_a_named_architecture(file, model, variables):
    for source in (file, str(file)):
        loaded, found = load_pretrained(NAME, weights=source, num_classes=3, **SHAPE)
        assert loaded == model
        assert_same_bits(found, variables)
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("float32")}


def test_a_released_name_is_downloaded(tmp_path, monkeypatch):
    asked = []

    def stand_in(released):
        asked.append(released.name)
        save_file({"head.weight": np.ones((1000, 4), np.float32)}, tmp_path / "w.safetensors")
        return tmp_path / "w.safetensors"

    monkeypatch.setattr(pretrained, "download", stand_in)
    with pytest.raises(UserError, match=r"w\.safetensors: these weights are not for this model"):
        load_pretrained("cait_xxs24_224", depth=1)
    assert asked == ["cait_xxs24_224"]
    with pytest.raises(UserError, match="no weights were released as cait_xs24"):
        load_pretrained("cait_xs24")
    with pytest.raises(UserError, match="no attribute 'dept'; nearest: depth"):
        load_pretrained("cait_xxs24_224", dept=1)
    assert asked == ["cait_xxs24_224"]


def test_a_number_type_that_would_round_must_be_asked_for(tmp_path, model, variables):
    exact = {key: array.astype(np.float16) for key, array in to_timm(variables).items()}
    write_safetensors(tmp_path / "half.safetensors", exact)
    _, found = load_pretrained(NAME, weights=tmp_path / "half.safetensors", num_classes=3, **SHAPE)
    np.testing.assert_array_equal(
        found["params"]["cls_token"], exact["cls_token"].astype(np.float32)
    )
    save_pretrained(tmp_path / "saved", model, variables)
    brain, found = load_pretrained(tmp_path / "saved", param_dtype="bfloat16")
    assert brain.param_dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(found)} == {jnp.dtype("bfloat16")}
    expected = np.asarray(variables["params"]["cls_token"]).astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["params"]["cls_token"], expected)

    double = {key: array.astype(np.float64) for key, array in exact.items()}
    write_safetensors(tmp_path / "double.safetensors", double)
    wide = {"weights": tmp_path / "double.safetensors", "num_classes": 3, **SHAPE}
    with pytest.raises(UserError, match="are float64, which float32 would round: give param_dtype"):
        load_pretrained(NAME, **wide)
    load_pretrained(NAME, param_dtype="float32", **wide)


def test_another_number_of_classes_is_refused_or_said(file, model, variables, caplog):
    with pytest.raises(
        UserError, match=r"have 3 classes and the model 5: give reset_head=True .* num_classes=3"
    ):
        load_pretrained(NAME, weights=file, num_classes=5, **SHAPE)
    heads = []
    for seed in (0, 0, 1):
        with caplog.at_level(logging.WARNING, "cait_jax"):
            _, found = load_pretrained(
                NAME, weights=file, num_classes=5, reset_head=True, seed=seed, **SHAPE
            )
        heads.append(np.asarray(found["params"]["head"]["kernel"]))
    assert "initialised from seed 0: head.bias, head.weight" in caplog.text
    assert heads[0].shape == (16, 5)
    assert 0.01 < heads[0].std() < 0.03
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])
    np.testing.assert_array_equal(found["params"]["head"]["bias"], 0)
    np.testing.assert_array_equal(
        found["params"]["blocks"]["attn"]["qkv"]["kernel"],
        variables["params"]["blocks"]["attn"]["qkv"]["kernel"],
    )


def test_features_leave_the_head_out_and_a_head_comes_back_only_if_asked(tmp_path, file):
    features, found = load_pretrained(NAME, weights=file, num_classes=0, **SHAPE)
    assert "head" not in found["params"]
    save_pretrained(tmp_path / "features", features, found)
    with pytest.raises(UserError, match="have no head, and the model has 4 classes"):
        load_pretrained(tmp_path / "features", num_classes=4)
    _, again = load_pretrained(tmp_path / "features", num_classes=4, reset_head=True)
    assert again["params"]["head"]["kernel"].shape == (16, 4)


def test_saved_grids_of_any_shape_are_resized(tmp_path, model, variables):
    save_pretrained(tmp_path / "square", model, variables)
    wide, found = load_pretrained(tmp_path / "square", image_size=(8, 24), patch_size=8)
    save_pretrained(tmp_path / "wide", wide, found)
    # Three patches are no square: the saved config says what they are.
    back, found = load_pretrained(tmp_path / "wide", image_size=32)
    assert (back.image_size, back.patch_size) == ((32, 32), 8)
    assert found["params"]["pos_embed"].shape == (1, 16, 16)
    given = {"weights": tmp_path / "wide" / "model.safetensors", "num_classes": 3, **SHAPE}
    with pytest.raises(UserError, match="give weights_image_size"):
        load_pretrained(NAME, image_size=32, patch_size=8, **given)
    _, same = load_pretrained(
        NAME, image_size=32, patch_size=8, weights_image_size=(8, 24), **given
    )
    np.testing.assert_array_equal(same["params"]["pos_embed"], found["params"]["pos_embed"])


def test_weights_of_another_architecture_name_the_file(file):
    with pytest.raises(
        UserError, match=r"w\.safetensors: these weights are not for this model: .*"
    ):
        load_pretrained(NAME, weights=file, num_classes=3, depth=2, width=32, num_heads=2)
    with pytest.raises(UserError, match=r"left over \(blocks\.1\..*"):
        load_pretrained(NAME, weights=file, num_classes=3, depth=1, width=16, num_heads=2)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("cait_xs2", r"no model 'cait_xs2'; nearest: cait_xs24"),
        ("clasifier", r"no model 'clasifier'; nearest: classifier$"),
        ("absent/", r"absent does not exist, so it is not a file of weights"),
        ("./clasifier", r"give one of these; nearest: classifier$"),
        ("empty", r"empty is not a file of weights .*give one of these"),
        (
            "w.safetensors",
            r"not the network they are of: give name_or_path=NAME and weights=",
        ),
    ],
)
def test_what_is_neither_a_name_nor_a_source(tmp_path, monkeypatch, file, place, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "classifier").mkdir()
    (tmp_path / "classifier" / "config.json").write_text("{}")
    with pytest.raises(UserError, match=sentence):
        load_pretrained(place)
    if place != "w.safetensors":
        with pytest.raises(UserError, match=sentence):
            load_settings(place)


def test_a_saved_network_may_take_other_weights(tmp_path, model, variables, file):
    save_pretrained(
        tmp_path / "saved", model, {"params": jax.tree.map(jnp.zeros_like, variables["params"])}
    )
    _, found = load_pretrained(tmp_path / "saved", weights=file)
    np.testing.assert_array_equal(found["params"]["cls_token"], variables["params"]["cls_token"])
    with pytest.raises(
        UserError, match=r"is a saved model, which has no average .* leave out ema=True"
    ):
        load_pretrained(tmp_path / "saved", ema=True)


def test_a_file_beside_a_saved_model_may_hold_an_average(tmp_path, model, variables):
    save_pretrained(tmp_path / "saved", model, variables)
    plain = to_timm(variables)
    average = {f"model_ema.{name}": array / 2 for name, array in plain.items()}
    both = average | {f"model.{name}": array for name, array in plain.items()}
    write_safetensors(tmp_path / "both.safetensors", both)
    write_safetensors(tmp_path / "plain.safetensors", plain)
    _, found = load_pretrained(tmp_path / "saved", weights=tmp_path / "both.safetensors", ema=True)
    assert_same_bits(found, jax.tree.map(lambda leaf: leaf / 2, variables))
    with pytest.raises(UserError, match="holds no average of its weights: leave out ema=True"):
        load_pretrained(tmp_path / "saved", weights=tmp_path / "plain.safetensors", ema=True)


def test_weights_of_another_network_without_a_head_are_not_told_to_take_one(tmp_path, variables):
    """What has no `head` but other names is another network, or its head has another name."""
    weights = to_timm(variables)
    weights["fc.weight"] = weights.pop("head.weight")
    weights["fc.bias"] = weights.pop("head.bias")
    for content, sentence in (
        (
            weights,
            r"2 missing \(head.bias, head.weight\); 2 left over \(fc.bias, fc.weight\): choose",
        ),
        (
            {name: np.ones(3, np.float32) for name in ("conv1.w", "bn1.w")},
            r"2 left over \(bn1.w, conv1.w\): choose",
        ),
    ):
        write_safetensors(tmp_path / "other.safetensors", content)
        with pytest.raises(UserError, match=sentence):
            load_pretrained(NAME, weights=tmp_path / "other.safetensors", num_classes=3, **SHAPE)


def test_settings_of_released_weights_are_the_tables():
    settings = load_settings("cait_s24_384")
    assert settings.preprocessing == find_released("cait_s24_384").preprocessing()
    assert settings.label_names is None
