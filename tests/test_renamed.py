"""Old names still work: on a command line, in the config of a saved run and in a saved model."""

import json
from pathlib import Path

import pytest

from cait_jax import UserError
from cait_jax.models.zoo import create_model
from cait_jax.renamed import OLD_KEYS, current_attributes, current_config
from cait_jax.train.config import as_json, flatten, get_config, load_config, parse_command_line
from cait_jax.train.keys import KEYS
from cait_jax.train.resume import check_resumable
from cait_jax.weights.model_json import model_from_dict, model_to_dict

DIGITS = str(Path(__file__).parents[1] / "configs" / "digits.py")
VALUES = {
    "model.drop_path_rate": 0.25,
    "data.aug_repeats": 2,
    "augment.scale": (0.5, 1.0),
    "augment.ratio": (0.5, 2.0),
    "augment.hflip": True,
    "augment.reprob": 0.125,
    "augment.mixup_prob": 0.5,
    "augment.mixup_switch_prob": 0.25,
    "loss.smoothing": 0.125,
    "loss.target_threshold": 0.25,
    "distill.alpha": 0.25,
    "optimizer.grad_accum": 2,
    "optimizer.sam_rho": 0.125,
    "optimizer.grad_clip_norm": 2.0,
    "eval.crop_pct": 0.875,
}


def with_old_keys(config):
    """The config as a run of before saved it."""
    saved = as_json(config)
    for old, new in OLD_KEYS.items():
        (section, before), (_, now) = old.split("."), new.split(".")
        saved[section][before] = saved[section].pop(now)
    return saved


def test_old_keys_are_gone_and_new_ones_exist():
    assert set(OLD_KEYS.values()) == VALUES.keys() <= KEYS.keys()
    assert not OLD_KEYS.keys() & KEYS.keys()


@pytest.mark.parametrize("old", OLD_KEYS)
def test_an_old_key_on_a_command_line_sets_the_new_one(old):
    new = OLD_KEYS[old]
    text = str(VALUES[new]).strip("()")
    for argv in ([f"--config.{old}={text}"], [f"--config.{new}=7", f"--config.{old}={text}"]):
        line = parse_command_line(argv)
        assert line.overrides == {new: text}
        assert flatten(load_config(DIGITS, line.overrides))[new] == VALUES[new]
    assert flatten(load_config(DIGITS, {old: text}))[new] == VALUES[new]
    with pytest.raises(UserError, match=rf"--config\.{new} is \? and must be"):
        load_config(DIGITS, {old: "?"})


def test_an_old_key_without_a_value_is_a_flag():
    line = parse_command_line(
        ["--noconfig.augment.flip", "--config.augment.flip", "--config.seed=1"]
    )
    assert line.overrides == {"augment.hflip": "true", "seed": "1"}


@pytest.mark.parametrize("old", OLD_KEYS)
def test_a_run_saved_under_old_keys_resumes_under_new_ones(old):
    config = get_config()
    saved = with_old_keys(config)
    check_resumable(saved, config, "runs/a")
    section, name = old.split(".")
    saved[section][name] = "other"
    with pytest.raises(UserError, match=f"{OLD_KEYS[old]} was 'other' and is now") as caught:
        check_resumable(saved, config, "runs/a")
    assert str(caught.value).count(" was ") == 2  # of the run, and of this key alone


def test_models_that_had_other_shapes_keep_them_in_old_runs():
    config = get_config()
    for now, old in {"vit_6x256": "vit_tiny", "vit_8x384": "vit_small"}.items():
        config.model.name = now
        saved = with_old_keys(config)
        saved["model"]["name"] = old
        check_resumable(saved, config, "runs/a")
        config.model.name = old  # as of today, another network
        with pytest.raises(UserError, match=f"model.name was '{now}' and is now '{old}'"):
            check_resumable(saved, config, "runs/a")
        assert current_config(as_json(config))["model"]["name"] == old


def test_a_model_saved_under_old_names_is_read():
    model = create_model("cait_nano4_patch4_8", drop_path_rate=0.25)
    described = model_to_dict(model)
    attributes = described["attributes"]
    attributes["drop_path"] = attributes.pop("drop_path_rate")
    assert model_from_dict(described) == model
    assert current_attributes({"drop_path": 1, "scale": 2}) == {"drop_path_rate": 1, "scale": 2}


def test_old_values_are_read_as_new_ones():
    config = load_config(DIGITS, {"model.attention": "xla_lean"})
    assert config.model.attention == "xla_remat"
    saved = as_json(config)
    saved["model"]["attention"] = "xla_lean"
    check_resumable(saved, config, "runs/a")
    model = create_model("cait_nano4_patch4_8", attention="xla_remat")
    described = model_to_dict(model)
    described["attributes"]["attention"] = "xla_lean"
    assert model_from_dict(described) == model
    with pytest.raises(UserError, match="attention 'xla_lean' must be one of xla, xla_remat"):
        create_model("cait_nano4_patch4_8", attention="xla_lean")


def test_a_key_younger_than_a_run_has_the_value_that_it_meant_then():
    """The config of a run of before augmentation in the step, as its checkpoint has it."""
    saved = json.loads((Path(__file__).parent / "fixtures" / "first_config.json").read_text())
    now = get_config()
    now.update_from_flattened_dict(
        {"data.aug_repeats": 1, "augment.rand_augment": "", "augment.reprob": 0.0, "augment.mixup": 0.0,
         "augment.cutmix": 0.0, "optimizer.eps": 1e-8, "optimizer.grad_clip_norm": 0.0}
    )  # fmt: skip
    check_resumable(saved, now, "run")
    now.augment.reprob = 0.25
    with pytest.raises(UserError, match=r"augment\.reprob was 0\.0 and is now 0\.25"):
        check_resumable(saved, now, "run")
