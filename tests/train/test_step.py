"""The step: the same numbers on any number of devices, with and without accumulation."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from marks import slow
from trees import random_params

from cait_jax import UserError, create_model
from cait_jax.augment.pipeline import Augmentation
from cait_jax.sharding import (
    batch_sharding,
    check_batch_size,
    make_mesh,
    put_batch,
    replicated,
)
from cait_jax.train.objectives.supervised import Supervised, cross_entropy
from cait_jax.train.optimizer import make_optimizer
from cait_jax.train.step import create_state, make_train_step, mean_over_micro_batches

BATCH = 16
AUGMENTATION = Augmentation(hflip=True, rotate=10.0, translate=0.1, zoom=0.1, shear=0.1, pad_crop=1)


def batches(steps):
    for step in range(steps):
        rng = np.random.default_rng(step)
        yield {
            "image": rng.integers(0, 256, (BATCH, 8, 8, 1), dtype=np.uint8),
            "label": rng.integers(0, 10, BATCH, dtype=np.int32),
        }


def run(devices, steps=20, accumulate=1, dtype="float32", **overrides):
    """Losses of each step, and the state after the last."""
    model = create_model(
        "cait_nano4_patch4_8", num_classes=10, depth=2, class_depth=1, width=32, num_heads=2,
        dtype=dtype, param_dtype=dtype, drop_path_rate=0.2, dropout=0.1, attention_dropout=0.1,
        embedding_dropout=0.1, precision="highest", **overrides,
    )  # fmt: skip
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 2, steps, end_value=1e-5)
    optimizer = make_optimizer(schedule, clip_norm=1.0)
    objective = Supervised(
        model, label_loss=cross_entropy, augmentation=AUGMENTATION, smoothing=0.1
    )
    mesh = make_mesh(devices)
    whole, rows = replicated(mesh), batch_sharding(mesh)
    step = jax.jit(
        make_train_step(optimizer, schedule, seed=3, grad_accum=accumulate, ema_decay=0.9),
        in_shardings=(whole, rows, whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )

    def init():
        return create_state(random_params(model), optimizer, ema=True)

    state = jax.jit(init, out_shardings=whole)()
    metrics = []
    for batch in batches(steps):
        state, values = step(state, put_batch(batch, rows), objective)
        metrics.append(jax.device_get(values))
    return metrics, jax.device_get(state)


@pytest.fixture(scope="module")
def alone():
    return run(jax.devices()[:1])


@pytest.mark.parametrize(("count", "accumulate"), [slow(8, 1), (2, 4)])
def test_losses_do_not_depend_on_devices_or_micro_batches(alone, count, accumulate):
    metrics, state = run(jax.devices()[:count], accumulate=accumulate)
    expected = [m["loss"] for m in alone[0]]
    np.testing.assert_allclose([m["loss"] for m in metrics], expected, rtol=1e-5)
    assert state.step == 20


def test_the_same_seed_gives_the_same_bits(alone):
    metrics, state = run(jax.devices()[:1])
    jax.tree.map(np.testing.assert_array_equal, (metrics, state), alone)


@pytest.mark.slow
def test_float64_agrees_to_its_own_rounding_on_eight_devices():
    with jax.enable_x64(True):
        one, _ = run(jax.devices()[:1], steps=3, dtype="float64")
        eight, _ = run(jax.devices()[:8], steps=3, dtype="float64", accumulate=2)
    np.testing.assert_allclose(
        [m["loss"] for m in one], [m["loss"] for m in eight], rtol=1e-13, atol=0
    )


def test_metrics_and_ema(alone):
    metrics, state = alone
    schedule = optax.warmup_cosine_decay_schedule(1e-6, 1e-3, 2, 20, end_value=1e-5)
    for step, values in enumerate(metrics):
        assert values["learning_rate"] == pytest.approx(float(schedule(step)), rel=1e-6)
        assert 0 <= values["accuracy"] <= 1
        assert values["grad_norm"] > 0
    difference = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, state.ema))
    assert 0 < float(difference) < 0.1 * float(optax.tree.norm(state.params))


@pytest.mark.slow
def test_the_learning_rate_reported_is_the_one_applied():
    """With SGD at rate 1 times the schedule, the move over the gradient is the rate."""
    model = create_model("cait_nano4_patch4_8", num_classes=10, depth=1, drop_path_rate=0.0)
    schedule = optax.warmup_cosine_decay_schedule(1e-3, 1e-1, 2, 4, end_value=1e-5)
    optimizer = optax.sgd(schedule)
    step = jax.jit(make_train_step(optimizer, schedule))
    objective = Supervised(model, cross_entropy)
    state = create_state(random_params(model), optimizer, ema=False)
    for batch in batches(3):
        after, values = step(state, jax.tree.map(jnp.asarray, batch), objective)
        moved = optax.tree.norm(jax.tree.map(jnp.subtract, after.params, state.params))
        assert float(moved / values["grad_norm"]) == pytest.approx(
            float(values["learning_rate"]), rel=1e-2
        )
        state = after


def test_mean_over_micro_batches_holds_each_example_once():
    batch = {"id": jnp.arange(12)}

    def seen(part):
        return jnp.zeros(12).at[part["id"]].add(1.0)

    for count in (1, 2, 3, 4):
        mean = mean_over_micro_batches(seen, batch, count)
        np.testing.assert_allclose(mean, 1 / count)


@pytest.mark.parametrize(("batch_size", "accumulate"), [(12, 1), (0, 1), (16, 4)])
def test_a_batch_the_devices_cannot_share_is_refused(batch_size, accumulate):
    with pytest.raises(
        UserError, match=f"batch_size {batch_size} must be a multiple of {8 * accumulate}"
    ):
        check_batch_size(batch_size, 8, accumulate)
