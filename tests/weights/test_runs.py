"""A training run's directory as a source of weights: read only, also while the run goes on."""

import dataclasses

import jax
import numpy as np
import optax
import pytest
from trees import random_params

from cait_jax import UserError
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train.config import as_json
from cait_jax.train.state import create_state
from cait_jax.weights.pretrained import load_pretrained, load_settings
from configs import digits


def save_run(workdir, model, *, steps=(1,), ema=False, **meta):
    """Checkpoints as the loop writes them, without the training."""
    config = digits.get_config()
    for name in ("depth", "width", "num_heads"):
        config.model[name] = getattr(model, name)
    config.optimizer.ema_decay = 0.99 if ema else 0.0
    config.eval.crop_ratio = 0.875
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in steps:
            state = create_state(random_params(model, seed=step), optax.adamw(1e-3), ema)
            if ema:
                state = dataclasses.replace(state, ema=random_params(model, seed=step + 100))
            checkpoints.save(step, state, {"config": as_json(config), **meta})


def contents(directory):
    return {p: p.read_bytes() if p.is_file() else None for p in directory.rglob("*")}


NAMED = {"class_names": ["a", "b", "c"], "channels": 1}


def test_the_newest_parameters_of_a_run_are_read_and_nothing_is_changed(
    tmp_path, model, assert_same_bits
):
    save_run(tmp_path, model, steps=(1, 2))
    before = contents(tmp_path)
    loaded, variables = load_pretrained(tmp_path)
    assert loaded == model
    assert_same_bits(variables, {"params": random_params(model, seed=2)})
    assert contents(tmp_path) == before


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


def test_the_average_is_taken_where_it_is_asked_for(tmp_path, model, assert_same_bits):
    save_run(tmp_path / "with", model, ema=True)
    _, variables = load_pretrained(tmp_path / "with", ema=True)
    assert_same_bits(variables, {"params": random_params(model, seed=101)})
    save_run(tmp_path / "without", model)
    with pytest.raises(UserError, match=r"without kept no average of its parameters .*without ema"):
        load_pretrained(tmp_path / "without", ema=True)


@pytest.mark.parametrize(("meta", "label_names"), [({}, ("0", "1", "2")), (NAMED, ("a", "b", "c"))])
def test_settings_come_from_the_runs_config(tmp_path, model, meta, label_names):
    save_run(tmp_path, model, **meta)
    settings = load_settings(tmp_path)
    assert settings.label_names == label_names
    assert settings.preprocessing == {
        "image_size": [8, 8], "crop_ratio": 0.875, "mean": [0.5], "std": [0.5], "channels": 1,
    }  # fmt: skip


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
            writer.save(step, create_state(params, optax.adamw(1e-3), False), meta)
            _, variables = load_pretrained(tmp_path)
            values = {float(leaf.min()) for leaf in jax.tree.leaves(variables)}
            if step > 2:
                assert len(values) == 1
                assert values.pop() in (step - 1, step)
