"""A saved model comes back as it was, or is refused; a save that fails leaves the one before."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import assert_same_bits, random_params

from cait_jax import Preprocessing, UserError, create_model, preprocessing
from cait_jax.models.inspect import abstract_variables
from cait_jax.weights.pretrained import load_pretrained, load_settings, save_pretrained
from cait_jax.weights.saved import config_section

PREPROCESSING = {
    "image_size": (8, 8),
    "crop_pct": 0.875,
    "mean": (0.5,),
    "std": (0.25,),
    "channels": 1,
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_load_save_load_gives_the_same_bits(tmp_path, model, dtype):
    model = model.clone(
        dtype=jnp.dtype(dtype),
        param_dtype=jnp.dtype(dtype),
        drop_path_rate=0.125,
        precision="highest",
    )
    variables = {"params": random_params(model)}
    save_pretrained(tmp_path / "first", model, variables)
    loaded, found = load_pretrained(tmp_path / "first")
    save_pretrained(tmp_path / "second", loaded, found)
    again, found_again = load_pretrained(str(tmp_path / "second"))
    assert (loaded, again) == (model, model)
    assert_same_bits(found, variables)
    assert_same_bits(found_again, variables)
    files = [tmp_path / name / "model.safetensors" for name in ("first", "second")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_the_loaded_model_gives_the_same_outputs(tmp_path, model, variables):
    forward = jax.jit(
        lambda model, variables, images: model.apply(variables, images), static_argnums=0
    )
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    save_pretrained(tmp_path, model, variables)
    expected = forward(model, variables, images)
    np.testing.assert_array_equal(forward(*load_pretrained(tmp_path), images), expected)
    assert np.ptp(expected) > 0.1


def test_blocks_may_be_stacked_otherwise(tmp_path, model, variables):
    save_pretrained(tmp_path, model, variables)
    unrolled, found = load_pretrained(tmp_path, stacked=False)
    assert "blocks_1" in found["params"]
    save_pretrained(tmp_path, unrolled, found)
    _, stacked = load_pretrained(tmp_path, stacked=True)
    assert_same_bits(stacked, variables)


@pytest.mark.parametrize(
    ("name", "attributes"),
    [
        ("deit_tiny_distilled", {"depth": 2, "width": 24, "num_heads": 2, "image_size": 32}),
        ("regnety_160", {"w0": 24, "wa": 24.0, "wm": 2.0, "depth": 9, "group_width": 8}),
    ],
)
def test_other_families_come_back_bit_for_bit(tmp_path, name, attributes):
    model = create_model(name, num_classes=3, param_dtype="bfloat16", **attributes)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
        abstract_variables(model),
    )
    save_pretrained(tmp_path, model, variables)
    loaded, found = load_pretrained(tmp_path)
    assert loaded == model
    assert_same_bits(found, variables)


@pytest.mark.parametrize("given", [PREPROCESSING, Preprocessing(**PREPROCESSING)])
def test_labels_and_preprocessing_come_back(tmp_path, model, variables, given):
    save_pretrained(tmp_path, model, variables, label_names=("a", "b", "ü"), preprocessing=given)
    assert preprocessing(tmp_path) == Preprocessing(**PREPROCESSING)
    settings = load_settings(tmp_path)
    assert settings.label_names == ("a", "b", "ü")
    assert settings.preprocessing == {
        "image_size": [8, 8], "crop_pct": 0.875, "mean": [0.5], "std": [0.25], "channels": 1,
    }  # fmt: skip
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"crop_pct"', '"crop_ratio"'))  # of older versions
    assert load_settings(tmp_path) == settings
    save_pretrained(tmp_path, model, variables)
    assert load_settings(tmp_path).label_names is None
    assert load_settings(tmp_path).preprocessing is None


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"label_names": ["a", "b"]}, "2 label names and the model has 3 classes"),
        (
            {"preprocessing": {"crop": 1.0}},
            "preprocessing has no setting 'crop'; nearest: crop_pct",
        ),
        ({"preprocessing": {"crop_pct": 1.0}}, "preprocessing lacks image_size, mean"),
        (
            {"preprocessing": PREPROCESSING | {"crop_pct": 2}},
            "crop_pct must be above 0 and at most 1",
        ),
        (
            {"preprocessing": Preprocessing((8, 16), mean=(0.5,), std=(0.5,))},
            r"makes images of shape \(8, 16, 3\) and the model takes \(8, 8, 1\)",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, model, variables, options, sentence):
    with pytest.raises(UserError, match=sentence):
        save_pretrained(tmp_path / "new", model, variables, **options)
    assert not (tmp_path / "new").exists()


def test_preprocessing_of_another_kind(model):
    with pytest.raises(UserError, match=r"is of type int; give a cait_jax\.Preprocessing"):
        config_section(model, label_names=None, preprocessing=224)


@pytest.mark.parametrize(
    ("edit", "sentence"),
    [
        (lambda p: p.pop("norm"), r"params/norm/bias is missing and should be float32 \(16,\)"),
        (lambda p: p.update(extra=jnp.zeros(2)), r"params/extra is float32 \(2,\) .* absent"),
        (lambda p: p.update(cls_token=jnp.zeros((1, 1, 8))), r"\(1, 1, 8\) .* \(1, 1, 16\)"),
        (
            lambda p: p.update(cls_token=jnp.zeros((1, 1, 16), jnp.bfloat16)),
            r"is bfloat16 .* should be float32 .* with their param_dtype",
        ),
    ],
)
def test_variables_of_another_model_are_not_saved(tmp_path, model, variables, edit, sentence):
    params = dict(variables["params"])
    edit(params)
    with pytest.raises(UserError, match=sentence):
        save_pretrained(tmp_path / "new", model, {"params": params})
    assert not (tmp_path / "new").exists()


def test_a_save_that_fails_leaves_the_one_before(tmp_path, model, variables, monkeypatch):
    save_pretrained(tmp_path, model, variables)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def no_space(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"could not be written .*No space left"):
        save_pretrained(tmp_path, model, {"params": random_params(model, seed=1)})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_weights_of_another_save_are_noticed(tmp_path, model, variables):
    save_pretrained(tmp_path / "a", model, variables)
    save_pretrained(tmp_path / "b", model, {"params": random_params(model, seed=1)})
    (tmp_path / "a" / "model.safetensors").replace(tmp_path / "b" / "model.safetensors")
    with pytest.raises(UserError, match=r"b/model\.safetensors is not the file .* SHA-256 differs"):
        load_pretrained(tmp_path / "b")
    with pytest.raises(UserError, match=r"a/model\.safetensors does not exist"):
        load_pretrained(tmp_path / "a")


def edited(config, **changes):
    return json.dumps({"cait_jax": {**config["cait_jax"], **changes}})


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (lambda config: "{", r"config\.json cannot be read .*save the model again"),
        (
            lambda config: '{"architecture": "x"}',
            r"does not say which network .* give name_or_path=NAME and weights='.*model.safetensors'",
        ),
        (lambda config: edited(config, format=2), r"of format 2, .* install a newer cait-jax"),
        (lambda config: edited(config, family="Gait"), r"no network 'Gait' .*CaiT"),
        (lambda config: edited(config, attributes={"withd": 3}), r"'withd'; nearest: .*width"),
        (
            lambda config: json.dumps({"cait_jax": {"format": 1, "label_names": None}}),
            "is incomplete",
        ),
    ],
)
def test_a_config_that_cannot_be_used(tmp_path, model, variables, text, sentence):
    save_pretrained(tmp_path, model, variables)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(text(config))
    with pytest.raises(UserError, match=sentence) as caught:
        load_pretrained(tmp_path)
    assert "\n" not in str(caught.value)
