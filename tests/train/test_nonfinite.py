"""Steps that are not finite: skipped, rolled back, stopped; nothing of them is saved or called best."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_runs import nan_images, nan_params, poison, small_digits
from trees import assert_same_bits

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train import NonFiniteError, loop, setup, train
from cait_jax.train.metrics import read_metrics
from cait_jax.train.nonfinite import NonFiniteSteps


@pytest.fixture
def config():
    config = small_digits()
    config.steps = 12
    config.optimizer.ema_decay = 0.9
    config.eval.batch_size = 360
    config.report.every_steps = 1
    config.nonfinite.skips = 2
    return config


def saved_states(workdir, run):
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for path in (workdir / "checkpoints").iterdir():
            if path.name.isdecimal():
                yield int(path.name), checkpoints.restore(run.state, int(path.name))[1]


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(jax.device_get(tree)))


@pytest.mark.slow
def test_one_bad_batch_is_skipped(config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, nan_images(5))
    run = train(config, tmp_path)
    assert run.finished
    assert run.state.step == 12
    assert_finite(run.state)
    assert "step 5: loss nan, gradient norm nan: skipped (1 in a row)" in capsys.readouterr().err
    losses = [
        row["train/loss"] for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row
    ]
    assert [loss is None for loss in losses] == [step == 5 for step in range(1, 13)]


@pytest.mark.slow
def test_a_skipped_step_changes_the_number_alone(config, tmp_path):
    trainer = setup.build(config)
    state = trainer.init_state()
    with trainer.train_batches() as batches:
        batch = put_batch(next(batches), batch_sharding(trainer.mesh))
    bad = {**batch, "image": batch["image"] * jnp.float32(jnp.nan)}
    before = jax.device_get(state)
    after, metrics = trainer.train_step(state, bad)
    assert not metrics["finite"]
    assert after.step == 1
    assert_same_bits(dataclasses.replace(jax.device_get(after), step=before.step), before)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first", [5, 6]
)  # the rollback is found beside a dispatched step, or before a save
def test_after_more_skips_than_allowed_the_state_is_of_the_checkpoint_before(
    config, tmp_path, monkeypatch, first, capsys
):
    poison(monkeypatch, nan_params(first))
    run = train(config, tmp_path)
    assert run.finished
    assert_finite(run.state)
    for _, state in saved_states(tmp_path, run):
        assert_finite(state)
    said = capsys.readouterr().err
    assert "rolled back to the state of step 4" in said
    # The same, without a fault, from the checkpoint's state and past the batches of the skipped steps.
    rolled = int(said.split("training goes on with the batch of step ")[1].split("\n")[0])
    rows = {
        row["step"]: row for row in read_metrics(tmp_path / "metrics.jsonl") if "train/loss" in row
    }
    assert list(rows) == list(range(1, 13))
    assert [step for step in rows if rows[step]["train/loss"] is None] == list(range(first, rolled))

    trainer = setup.build(config)
    state = trainer.init_state()
    with trainer.train_batches() as batches:
        for step, batch in zip(range(1, 13), batches, strict=False):
            if not 4 < step < rolled:
                number = jax.device_put(np.int32(step - 1), state.step.sharding)
                batch = put_batch(batch, batch_sharding(trainer.mesh))
                state, metrics = trainer.train_step(dataclasses.replace(state, step=number), batch)
                assert float(metrics["loss"]) == rows[step]["train/loss"]
    assert_same_bits(state.params, run.state.params)


@pytest.mark.slow
def test_a_run_that_is_rolled_back_too_often_stops(config, tmp_path, monkeypatch, capsys):
    config.nonfinite.rollbacks = 2
    config.optimizer.grad_clip_norm = 0.0
    poison(monkeypatch, nan_params(*range(6, 13)))
    config.nonfinite.skips = 0
    for _ in range(2):  # a restart comes to the same end
        with pytest.raises(
            NonFiniteError,
            match=r"step \d+: loss nan.* rolled back 2 times already: lower .* set .*grad_clip_norm=1",
        ):
            train(config, tmp_path)
    assert capsys.readouterr().err.count("rolled back to the state of step") == 3
    steps = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdecimal())
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for step in steps:
            assert_finite(checkpoints.restore_part("params", step=step)[1])


@pytest.mark.slow
def test_an_evaluation_that_is_not_finite_ends_badly_and_is_never_the_best(
    config, tmp_path, monkeypatch
):
    build = loop.build

    def with_bad_evaluation(*args, **kwargs):
        trainer = build(*args, **kwargs)
        count = 0

        def evaluate(params, batches, progress=None):
            nonlocal count
            count += 1
            found = trainer.evaluate(params, batches)
            return {**found, "": {"loss": math.nan, "accuracy": 1.0}} if count == 3 else found

        return dataclasses.replace(trainer, evaluate=evaluate)

    monkeypatch.setattr(loop, "build", with_bad_evaluation)
    with pytest.raises(NonFiniteError, match=r"the evaluation of step 12 has eval/loss nan"):
        train(config, tmp_path)
    with pytest.raises(NonFiniteError, match=r"the evaluation of step 12 has eval/loss nan"):
        train(config, tmp_path)  # finished, and still bad
    with Checkpoints(tmp_path / "checkpoints", best_metric="eval/accuracy") as checkpoints:
        assert checkpoints.best_step() != 12
    last = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["eval/loss"] is None


@pytest.mark.slow
def test_a_stopped_run_rolls_back_to_the_same_step(config, tmp_path, monkeypatch):
    """A stop saves one step more, from which a run that is not stopped would not start."""
    poison(monkeypatch, nan_params(8))
    config.checkpoint.every_steps = 5
    config.checkpoint.keep = 1
    config.eval.every_epochs = 1.0
    whole = train(config, tmp_path / "whole")

    from contextlib import contextmanager

    stop = loop.stop_signal

    @contextmanager
    def stopping():
        with stop():
            yield lambda step: step == 7

    monkeypatch.setattr(loop, "stop_signal", stopping)
    assert not train(config, tmp_path / "stopped").finished
    monkeypatch.setattr(loop, "stop_signal", stop)
    resumed = train(config, tmp_path / "stopped")
    assert_same_bits(resumed.state, whole.state)


def test_a_state_found_bad_when_it_is_saved_is_named(config):
    config.nonfinite.rollbacks = 0
    steps = NonFiniteSteps(config, "run")
    with pytest.raises(NonFiniteError, match=r"^step 7: its new state is not finite, and "):
        steps.roll_back(7, 0)
