"""A training run's directory as a source of weights: read only, also while the run goes on."""

import jax
import numpy as np
import optax
import pytest
from small_runs import save_run
from trees import assert_same_bits, random_params

from cait_jax import UserError, create_model
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train.config import as_json
from cait_jax.train.step import create_state
from cait_jax.weights.adapt import mean_params
from cait_jax.weights.pretrained import load_model, load_pretrained, load_settings
from configs import digits


def contents(directory):
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


NAMED = {"class_names": ["a", "b", "c"], "channels": 1}


def test_the_newest_parameters_of_a_run_are_read_and_nothing_is_changed(tmp_path, model):
    save_run(tmp_path, model, steps=(1, 2))
    before = contents(tmp_path)
    loaded, variables = load_pretrained(tmp_path)
    assert loaded == load_model(tmp_path) == model
    assert_same_bits(variables, {"params": random_params(model, seed=2)})
    assert contents(tmp_path) == before


def test_one_checkpoint_of_a_run_is_read_by_its_step(tmp_path, model):
    save_run(tmp_path, model, steps=(1, 2), **NAMED)
    checkpoints = tmp_path / "checkpoints"
    for step in (1, 2):
        loaded, variables = load_pretrained(checkpoints / str(step))
        assert loaded == model
        assert_same_bits(variables, {"params": random_params(model, seed=step)})
        assert load_settings(checkpoints / str(step)).label_names == ("a", "b", "c")
    with pytest.raises(UserError, match=r"checkpoints/3 does not exist"):
        load_pretrained(checkpoints / "3")
    (checkpoints / "1" / "manifest.json").unlink()  # no other in its place
    with pytest.raises(UserError, match="step 1"):
        load_pretrained(checkpoints / "1")


@pytest.mark.slow
def test_a_runs_last_checkpoints_have_a_mean(tmp_path, model):
    save_run(tmp_path, model, steps=(1, 2), ema=True)
    steps = [tmp_path / "checkpoints" / step for step in ("1", "2")]
    for ema, seed in ((False, 0), (True, 100)):
        mean = mean_params(load_pretrained(step, ema=ema)[1]["params"] for step in steps)
        expected = jax.tree.map(
            lambda a, b: (np.float64(a) + b) / 2,
            random_params(model, seed=seed + 1),
            random_params(model, seed=seed + 2),
        )
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), mean, expected)


def test_a_run_gives_weights_to_a_model_of_another_size(tmp_path, model):
    save_run(tmp_path, model, **NAMED)
    loaded, variables = load_pretrained(
        "cait_nano4_patch4_8",
        weights=tmp_path,
        image_size=16,
        num_classes=0,
        depth=model.depth,
        width=model.width,
        num_heads=model.num_heads,
    )
    assert loaded.image_size == (16, 16)
    assert "head" not in variables["params"]
    assert variables["params"]["pos_embed"].shape == (1, 16, model.width)


def test_the_average_is_taken_where_it_is_asked_for(tmp_path, model):
    save_run(tmp_path / "with", model, ema=True)
    _, variables = load_pretrained(tmp_path / "with", ema=True)
    assert_same_bits(variables, {"params": random_params(model, seed=101)})
    save_run(tmp_path / "without", model)
    with pytest.raises(
        UserError, match=r"without kept no average of its parameters .*leave out ema=True"
    ):
        load_pretrained(tmp_path / "without", ema=True)


@pytest.mark.parametrize(("meta", "label_names"), [({}, ("0", "1", "2")), (NAMED, ("a", "b", "c"))])
def test_settings_come_from_the_runs_config(tmp_path, model, meta, label_names):
    save_run(tmp_path, model, **meta)
    settings = load_settings(tmp_path)
    assert settings.label_names == label_names
    assert settings.preprocessing == {
        "image_size": [8, 8], "crop_pct": 0.875, "mean": [0.5], "std": [0.5], "channels": 1,
    }  # fmt: skip


def test_a_run_saved_under_old_keys_is_read(tmp_path, model):
    save_run(tmp_path, model, **NAMED)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        config = checkpoints.meta()["config"]
        config["eval"]["crop_ratio"] = config["eval"].pop("crop_pct")
        config["model"]["drop_path"] = config["model"].pop("drop_path_rate")
        checkpoints.save(
            2, create_state(random_params(model), optax.adamw(1e-3), ema=False), {"config": config}
        )
    assert load_pretrained(tmp_path)[0] == model
    assert load_settings(tmp_path).preprocessing["crop_pct"] == 0.875


def test_a_run_of_a_model_whose_name_changed_is_read(tmp_path):
    """The `vit_tiny` of then has four heads, which no shape tells; that of today has three."""
    config = digits.get_config()
    config.model.name, config.model.depth, config.model.width = "vit_6x256", 1, 24
    config.model.patch_size = 4
    size = {"image_size": 8, "in_channels": 1, "num_classes": 10}
    model = create_model(**config.model, **size)
    saved = as_json(config)
    saved["model"] |= {"name": "vit_tiny", "drop_path": saved["model"].pop("drop_path_rate")}
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        state = create_state(random_params(model), optax.adamw(1e-3), ema=False)
        meta = {"class_names": list("0123456789"), "channels": 1}
        checkpoints.save(1, state, {"config": saved, **meta})
    loaded, _ = load_pretrained(tmp_path)
    assert loaded == model
    assert loaded.num_heads == 4


def test_a_run_without_a_checkpoint_yet(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(UserError, match=r"has saved no checkpoint yet"):
        load_pretrained(tmp_path)
    with pytest.raises(UserError, match="no checkpoint"):
        load_settings(tmp_path)


def test_a_run_that_goes_on_is_read_beside_it(tmp_path, model):
    """A writer keeps one checkpoint and saves without pause; every read is of one whole step."""
    save_run(tmp_path, model, **NAMED)
    meta = Checkpoints(tmp_path / "checkpoints").meta()
    template = random_params(model)
    with Checkpoints(tmp_path / "checkpoints", keep=1) as writer:
        for step in range(2, 6):
            params = jax.tree.map(lambda leaf, step=step: np.full_like(leaf, step), template)
            writer.save(step, create_state(params, optax.adamw(1e-3), ema=False), meta)
            _, variables = load_pretrained(tmp_path)
            values = {float(leaf.min()) for leaf in jax.tree.leaves(variables)}
            if step > 2:
                assert len(values) == 1
                assert values.pop() in (step - 1, step)
