"""Records of LayerScale and branch norms in training."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from cait_jax import UserError, create_model
from cait_jax.cli.plot import _inspected
from cait_jax.explain.depth import branch_ratio
from cait_jax.train import train
from cait_jax.train.branch_records import IMAGES, branch_recorder
from cait_jax.train.setup import build
from configs import digits


def small(**model):
    config = digits.get_config()
    config.model.depth = 2
    config.batch_size, config.steps = 16, 6
    config.report.inspect_every = 2
    for key, value in model.items():
        config.model[key] = value
    return config


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_records_are_of_the_state_after_their_step(tmp_path, stacked):
    run = train(small(stacked=stacked), tmp_path / "run")
    files = sorted(path.name for path in (tmp_path / "run" / "inspect").iterdir())
    assert files == [f"{step:08d}.npz" for step in (2, 4, 6)]
    with np.load(tmp_path / "run" / "inspect" / "00000006.npz") as record:
        found = dict(record)
    params = run.state.params
    gamma = (
        params["blocks"]["layer_scale_1"]["gamma"]
        if stacked
        else np.stack([params[f"blocks_{i}"]["layer_scale_1"]["gamma"] for i in range(2)])
    )
    np.testing.assert_array_equal(found["layer_scale_1"][:2], gamma)
    last = params["blocks_token_only_1"]["layer_scale_2"]["gamma"]
    np.testing.assert_array_equal(found["layer_scale_2"][-1], last)

    trainer = build(small(stacked=stacked))
    batches = trainer.train_batches(5)
    images = next(batches)["image"][:IMAGES]
    batches.close()
    data = trainer.config.data
    normalised = (images / 255 - np.array(data.mean)) / np.array(data.std)
    expected = branch_ratio(run.model, {"params": params}, normalised.astype(np.float32))
    np.testing.assert_allclose(found["branch_ratio"], expected, rtol=1e-4)
    for part in ("layer_scale", "branch_ratio"):
        assert _inspected(tmp_path / "run", part) is not None


@pytest.mark.slow
def test_recording_changes_no_bit_of_a_run_and_resumes_to_the_same_records(tmp_path):
    plain = small()
    plain.report.inspect_every = 0
    without = train(plain, tmp_path / "without")
    whole = train(small(), tmp_path / "whole")
    jax.tree.map(np.testing.assert_array_equal, without.state.params, whole.state.params)
    assert not (tmp_path / "without" / "inspect").exists()

    part = small()
    part.checkpoint.every_steps = 3
    train(part, tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "checkpoints" / "6")
    for step in (4, 6):
        (tmp_path / "part" / "inspect" / f"{step:08d}.npz").unlink()
    train(part, tmp_path / "part")
    for step in (2, 4, 6):
        name = f"inspect/{step:08d}.npz"
        with np.load(tmp_path / "part" / name) as a, np.load(tmp_path / "whole" / name) as b:
            assert set(a) == set(b)
            for key in a:
                np.testing.assert_array_equal(a[key], b[key])


def test_a_network_without_attention_is_refused(tmp_path):
    trainer = build(small())
    objective = trainer.objective.replace(model=create_model("regnety_160"))
    trainer = dataclasses.replace(trainer, objective=objective)
    with pytest.raises(UserError, match=r"inspect_every is for transformers, and .* is none"):
        branch_recorder(trainer, tmp_path)
