"""What is exported is what timm makes of the same attributes, and can be loaded again here.

That timm loads it strictly and gives the same logits is held by benchmarks/export_to_timm.py.
"""

import json

import jax
import jax.numpy as jnp
import pytest
from safetensors import safe_open
from trees import assert_same_bits, random_params

from cait_jax import Preprocessing, UserError, create_model
from cait_jax.models.inspect import abstract_variables
from cait_jax.weights.hub import RELEASED
from cait_jax.weights.pretrained import load_pretrained, load_settings
from cait_jax.weights.timm_export import export_timm, timm_constructor

PREPROCESSING = {
    "image_size": [8, 8], "crop_pct": 0.9, "mean": [0.5], "std": [0.25], "channels": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_timms_entry_points(name):
    model = create_model(name)
    call = timm_constructor(model)
    untagged = name.partition(".")[0]
    # Of one shape; the first in the table is named.
    same = {
        f"vit_{size}_patch16_224": f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")
    }
    differing = {} if model.num_classes else {"num_classes": 0}
    assert (call.entry_point, call.named) == (same.get(untagged, untagged), differing)


def test_vit_shapes_without_a_name_are_the_constructors_call():
    call = timm_constructor(create_model("vit_6x256", residual="layerscale", class_token="mean"))
    assert call.constructor == "timm.models.vision_transformer.VisionTransformer"
    assert call.named is None
    assert call.arguments["init_values"] == 1e-5
    assert call.arguments["global_pool"] == "avg"
    call = timm_constructor(create_model("deit_tiny_distilled", depth=3))
    assert call.constructor == "timm.models.deit.VisionTransformerDistilled"
    assert call.classifier == ["head", "head_dist"]
    assert call.entry_point == "deit_tiny_distilled_patch16_224"


def test_options_of_vits_relatives_are_arguments_of_timms():
    model = create_model("vit_tiny", registers=2, class_position=False, mean_pool=True)
    call = timm_constructor(model)
    expected = {"reg_tokens": 2, "no_embed_class": True, "global_pool": "avg", "fc_norm": True}
    assert call.named is None
    assert expected.items() <= call.arguments.items()
    with pytest.raises(UserError, match="gated MLPs"):
        timm_constructor(create_model("vit_tiny", swiglu=True))


def test_a_regnety_of_another_size_is_a_config_overlaid(tmp_path):
    call = timm_constructor(create_model("regnety_160", num_classes=5))
    assert call.named == {"num_classes": 5}
    small = create_model("regnety_160", w0=24, wa=24.0, wm=2.0, depth=9, group_width=8)
    assert timm_constructor(small).named is None
    variables = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), abstract_variables(small))
    export_timm(tmp_path, small, variables)
    card = (tmp_path / "README.md").read_text()
    assert "RegNet(timm.models.regnet.RegNetCfg(), in_chans=3, num_classes=1000, w0=24, " in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["group_size"] == 8
    assert not config["pretrained_cfg"]["fixed_input_size"]


def test_a_released_shape_at_another_size_is_named_with_what_differs():
    call = timm_constructor(create_model("cait_xs24", num_classes=10))
    assert call.entry_point == "cait_xs24_384"
    assert call.named == {"img_size": 224, "num_classes": 10}
    call = timm_constructor(create_model("cait_s24", image_size=(96, 160), in_channels=1))
    assert call.named == {"img_size": [96, 160], "in_chans": 1}


@pytest.mark.parametrize(
    ("attributes", "argument", "value"),
    [
        ({"depth": 5}, "depth", 5),
        ({"width": 96, "num_heads": 4}, "embed_dim", 96),
        ({"class_depth": 3}, "depth_token_only", 3),
        ({"patch_size": 32}, "patch_size", 32),
        ({"mlp_ratio": 3.0}, "mlp_ratio_token_only", 3.0),
        ({"class_mlp_ratio": 2.0}, "mlp_ratio_token_only", 2.0),
        ({"layer_scale_init": 0.1, "depth": 5}, "init_values", 0.1),
        ({"image_size": (32, 64), "depth": 5}, "img_size", [32, 64]),
    ],
)
def test_any_other_shape_is_the_constructors_call(attributes, argument, value):
    call = timm_constructor(create_model("cait_xxs24", **attributes))
    assert call.constructor == "timm.models.cait.Cait"
    assert call.named is None
    assert call.arguments[argument] == value


@pytest.mark.parametrize(
    ("attributes", "sentence"),
    [
        ({"residual": "rezero", "talking_heads": False}, r"residual 'rezero', talking_heads False"),
        ({"class_token": "mean"}, r"timm's VisionTransformer has no talking_heads True"),
        ({"class_token": 1, "talking_heads": False}, r"VisionTransformer has no class_token 1"),
        ({"residual": "plain", "block_norm": False}, r"Cait has no residual 'plain', block_norm "),
        ({"class_mlp_ratio": 0.0}, r"class_mlp_ratio 0"),
    ],
)
def test_what_timm_lacks_is_refused_by_name(tmp_path, attributes, sentence):
    with pytest.raises(UserError, match=sentence):
        export_timm(tmp_path / "new", create_model("cait_xxs24", depth=2, **attributes), {})
    assert not (tmp_path / "new").exists()


def test_what_only_training_and_speed_know_of_is_no_hindrance():
    model = create_model(
        "cait_xxs24_224",
        drop_path_rate=0.5,
        dropout=0.1,
        remat="block",
        stacked=False,
        dtype="bfloat16",
    )
    assert timm_constructor(model).named == {}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_exported_directory_loads_here_with_the_same_bits(tmp_path, model, dtype):
    model = model.clone(param_dtype=jnp.dtype(dtype))
    variables = {"params": random_params(model)}
    export_timm(
        tmp_path, model, variables, name="Digits", label_names="abc",
        preprocessing=Preprocessing.from_dict(PREPROCESSING),
    )  # fmt: skip
    loaded, found = load_pretrained(tmp_path)
    assert loaded == model
    assert_same_bits(found, variables)
    assert load_settings(tmp_path).label_names == ("a", "b", "c")
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert file.get_slice("blocks.1.gamma_2").get_dtype() == {"float32": "F32"}.get(
            dtype, "BF16"
        )

    card = (tmp_path / "README.md").read_text()
    assert "# Digits" in card
    assert "timm.models.cait.Cait(img_size=8, in_chans=1, num_classes=3, patch_size=4, " in card
    assert "mean (0.5,) and std (0.25,)" in card
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_args"]["embed_dim"] == model.width
    assert config["pretrained_cfg"]["input_size"] == [1, 8, 8]
    assert config["pretrained_cfg"]["crop_pct"] == 0.9
    assert config["label_names"] == ["a", "b", "c"]


def test_a_file_alone(tmp_path, model, variables):
    export_timm(tmp_path / "w.safetensors", model, variables)
    assert [file.name for file in tmp_path.iterdir()] == ["w.safetensors"]
    _, found = load_pretrained(
        "cait_nano4_patch4_8",
        weights=tmp_path / "w.safetensors",
        num_classes=3,
        depth=2,
        width=16,
        num_heads=2,
    )
    assert_same_bits(found, variables)


def test_the_card_of_a_released_shape_names_the_entry_point(tmp_path):
    model = create_model("cait_xxs24", image_size=32, num_classes=2)
    export_timm(tmp_path, model, {"params": random_params(model)})
    card = (tmp_path / "README.md").read_text()
    assert (
        "timm.create_model('cait_xxs24_224', img_size=32, num_classes=2, checkpoint_path=" in card
    )
    assert 'timm.create_model("local-dir:DIRECTORY"' in card
    assert "how they were normalised is not recorded" in card
