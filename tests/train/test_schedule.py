"""Learning rates against timm's schedulers, and at the borders of epochs.

`fixtures/schedules.json` holds the rate that each epoch began with when a loop called `scheduler.step(epoch)`
after every epoch, as DeiT's `main.py` does, with the schedulers of timm 0.3.2's `create_scheduler` (1.0.31
gives the same numbers); and, as `step_by_update`, the rate of each of 225 updates with timm 1.0.31's
`StepLRScheduler(t_in_epochs=False, warmup_prefix=False)` for 1,437 examples in batches of 64.
"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax import UserError
from cait_jax.train.optimizer import (
    Decay,
    epoch_schedule,
    step_schedule,
)

RECORDED = json.loads((Path(__file__).parents[1] / "fixtures" / "schedules.json").read_text())
BY_EPOCH = {
    "imagenet": Decay(peak=1e-3, epochs=400.0),
    "rising": Decay(peak=5e-6, epochs=60.0),
    "no_warmup": Decay(peak=0.01, epochs=7.0, warmup_epochs=0.0),
    "short": Decay(peak=1e-3, epochs=3.0),
    "step": Decay(kind="step", peak=5e-6, epochs=60.0, decay_epochs=10.0, decay_rate=0.5),
    "step_default": Decay(kind="step", peak=0.1, epochs=100.0),
}


@pytest.mark.parametrize("name", BY_EPOCH)
@pytest.mark.parametrize(("examples", "batch_size"), [(1_281_167, 1024), (64, 64), (1437, 64)])
def test_rates_by_epoch_are_timms_as_deit_drives_them(name, examples, batch_size):
    decay, rates = BY_EPOCH[name], np.asarray(RECORDED[name])
    total_steps = round(decay.epochs * examples / batch_size)
    # The first and the last step of each epoch, and whatever lies between them in short runs.
    epochs = np.arange(total_steps) * batch_size // examples
    steps = np.flatnonzero(np.diff(epochs, prepend=-1) | np.diff(epochs, append=-1))
    with jax.enable_x64(True):
        schedule = epoch_schedule(decay, examples=examples, batch_size=batch_size)
        found = jax.vmap(schedule)(jnp.asarray(steps, jnp.int32))
    assert found.dtype == jnp.float64
    np.testing.assert_allclose(found, rates[epochs[steps]], rtol=1e-14)


def test_the_first_two_epochs_warm_up_alike_and_the_peak_is_in_epoch_6():
    schedule = epoch_schedule(BY_EPOCH["imagenet"], examples=10, batch_size=1)
    rates = np.asarray(jax.vmap(schedule)(jnp.arange(4000))).reshape(400, 10)
    assert (rates == rates[:, :1]).all()
    assert rates[0, 0] == rates[1, 0] == np.float32(1e-6)
    assert rates[:, 0].argmax() == 6
    # The rates of the first 7 epochs together; by step they are 1.50 times as much.
    by_step = step_schedule(BY_EPOCH["imagenet"], examples=10, batch_size=1, total_steps=4000)
    ratio = sum(float(by_step(step)) for step in range(70)) / rates[:7].sum()
    assert ratio == pytest.approx(1.50, abs=0.02)


def test_the_rate_stays_at_its_last_value_after_the_run():
    schedule = epoch_schedule(Decay(peak=1.0, epochs=3.0), examples=4, batch_size=2)
    assert schedule(5) == schedule(1000)


def test_epochs_need_not_be_whole():
    for epochs in (0.001, 2.5):
        schedule = epoch_schedule(Decay(peak=1.0, epochs=epochs), examples=4, batch_size=2)
        assert np.isfinite(schedule(0))


def test_steps_by_update_are_timms():
    decay = Decay(
        kind="step", peak=0.1, epochs=10.0, warmup_epochs=2.0, warmup_from=1e-3,
        decay_epochs=3.0, decay_rate=0.5,
    )  # fmt: skip
    schedule = step_schedule(decay, examples=1437, batch_size=64, total_steps=225)
    found = jax.vmap(schedule)(jnp.arange(225))
    np.testing.assert_allclose(found, RECORDED["step_by_update"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("warmup_epochs", [0.0, 2.0])
def test_drops_are_at_the_first_step_of_their_epoch(warmup_epochs):
    decay = Decay(kind="step", peak=1.0, epochs=9.0, warmup_epochs=warmup_epochs, decay_epochs=3.0)
    schedule = step_schedule(decay, examples=10, batch_size=5, total_steps=18)
    rates = [float(schedule(step)) for step in (5, 6, 11, 12, 17)]
    np.testing.assert_allclose(rates, [1.0, 0.1, 0.1, 0.01, 0.01], rtol=1e-6)


def test_schedule_warms_up_linearly_and_ends_at_the_final_rate():
    decay = Decay(peak=1e-3, epochs=4.0, warmup_epochs=1.0, warmup_from=1e-6, final=1e-5)
    schedule = step_schedule(decay, examples=200, batch_size=2, total_steps=400)
    rates = np.array([schedule(step) for step in range(401)])
    assert rates[0] == pytest.approx(1e-6, rel=1e-5)
    assert rates[50] == pytest.approx((1e-6 + 1e-3) / 2, rel=1e-5)
    assert rates[100] == pytest.approx(1e-3, rel=1e-5)
    assert rates[250] == pytest.approx((1e-5 + 1e-3) / 2, rel=1e-4)
    assert rates[400] == pytest.approx(1e-5, rel=1e-4)
    assert rates.argmax() == 100


def test_without_a_warm_up_the_cosine_starts_at_the_peak():
    decay = Decay(peak=1e-3, epochs=4.0, warmup_epochs=0.0, final=1e-5)
    schedule = step_schedule(decay, examples=200, batch_size=2, total_steps=400)
    found = [schedule(step) for step in (0, 200, 400)]
    np.testing.assert_allclose(found, [1e-3, (1e-5 + 1e-3) / 2, 1e-5], rtol=1e-4)


def test_a_run_shorter_than_its_warm_up_ends_inside_it():
    decay = Decay(peak=1e-3, epochs=0.05, warmup_epochs=1.0, warmup_from=0.0)
    schedule = step_schedule(decay, examples=200, batch_size=2, total_steps=5)
    np.testing.assert_allclose([schedule(s) for s in range(5)], np.arange(5) * 1e-5, rtol=1e-5)


def test_an_unknown_schedule_is_named_with_those_that_exist():
    with pytest.raises(UserError, match=r"no optimizer\.schedule 'cosin'; nearest: cosine"):
        Decay(peak=1.0, epochs=1.0, kind="cosin")
