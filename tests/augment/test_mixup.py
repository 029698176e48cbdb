"""Mixup and CutMix of a batch with its reverse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.augment.mixup import Mixup, cutmix_box, mix, sample_weights, soft_labels
from cait_jax.errors import UserError
from cait_jax.plan.hlo import collectives, read_program
from cait_jax.sharding import batch_sharding, make_mesh, replicated
from cait_jax.train.step import mean_over_micro_batches

BOTH = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
LABELS = jnp.array([0, 1, 2, 3, 3, 1, 0, 4])
mixed = jax.jit(mix, static_argnums=3)


def images(batch=8, size=(6, 5)):
    return jax.random.normal(jax.random.key(7), (batch, *size, 3))


def shares(settings, size=(6, 5), count=2000):
    one = functools.partial(sample_weights, size=size, settings=settings)
    share, kept = jax.vmap(one)(jax.random.split(jax.random.key(0), count))
    return np.asarray(share), np.asarray(kept)


def test_soft_labels_are_smoothed_as_in_the_recipe():
    found = soft_labels(jnp.array([2, 0]), 5, 0.1)
    expected = np.full((2, 5), 0.1 / 5)
    expected[[0, 1], [2, 0]] = 1 - 0.1 + 0.1 / 5
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    np.testing.assert_array_equal(soft_labels(jnp.array([1]), 3), [[0, 1, 0]])


def test_mixing_is_the_formula():
    batch, targets = images(), soft_labels(LABELS, 5, 0.1)
    for seed in range(8):
        key = jax.random.key(seed)
        share, kept = (np.asarray(part) for part in sample_weights(key, (6, 5), BOTH))
        found, found_targets = mixed(key, batch, targets, BOTH)
        for i in range(8):
            weight = share[..., None]
            expected = weight * batch[i] + (1 - weight) * batch[7 - i]
            np.testing.assert_allclose(found[i], expected, rtol=0, atol=1e-6)
            expected = kept * targets[i] + (1 - kept) * targets[7 - i]
            np.testing.assert_allclose(found_targets[i], expected, rtol=0, atol=1e-6)
        np.testing.assert_allclose(found.mean(0), batch.mean(0), rtol=0, atol=1e-6)
        np.testing.assert_allclose(found_targets.sum(1), 1, rtol=0, atol=1e-6)


@pytest.mark.parametrize("count", [8, 10])
def test_groups_have_draws_of_their_own_and_mix_within(count):
    settings = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, group_size=4)
    batch = images(count)
    targets = soft_labels(jnp.arange(count) % 5, 5, 0.1)
    key = jax.random.key(2)
    found, found_targets = mixed(key, batch, targets, settings)
    shares_drawn = []
    for group, start in enumerate(range(0, count, 4)):
        part = slice(start, min(start + 4, count))
        share, kept = sample_weights(jax.random.fold_in(key, group), (6, 5), settings)
        shares_drawn.append(float(kept))
        expected = (
            share[None, ..., None] * batch[part] + (1 - share[None, ..., None]) * batch[part][::-1]
        )
        np.testing.assert_allclose(found[part], expected, rtol=0, atol=1e-6)
        expected = kept * targets[part] + (1 - kept) * targets[part][::-1]
        np.testing.assert_allclose(found_targets[part], expected, rtol=0, atol=1e-6)
    assert len(set(shares_drawn)) == len(shares_drawn)


def test_a_group_as_large_as_the_batch_is_the_batch():
    batch, targets = images(), soft_labels(LABELS, 5)
    whole = mixed(jax.random.key(4), batch, targets, BOTH)
    for rows in (8, 12):
        found = mixed(
            jax.random.key(4),
            batch,
            targets,
            Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, group_size=rows),
        )
        for expected, got in zip(whole, found, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_lambda_of_mixup_is_beta():
    share, kept = shares(Mixup(mixup_alpha=0.8))
    np.testing.assert_array_equal(share, np.broadcast_to(kept[:, None, None], share.shape))
    assert abs(kept.mean() - 0.5) < 6 * 0.31 / 2000**0.5
    assert abs(kept.var() - 1 / (4 * 2.6)) < 0.01  # 1 / (4 (2 alpha + 1))


def test_cutmix_keeps_the_label_by_the_area_really_pasted():
    share, kept = shares(Mixup(cutmix_alpha=1.0), size=(12, 9))
    pasted = share == 0
    assert set(np.unique(share)) == {0, 1}
    np.testing.assert_array_equal(np.round((1 - kept) * 108), pasted.sum((1, 2)))
    np.testing.assert_allclose((1 - kept) * 108, pasted.sum((1, 2)), rtol=0, atol=1e-4)
    sides = pasted.any(2).sum(1) * pasted.any(1).sum(1)
    np.testing.assert_array_equal(sides, pasted.sum((1, 2)))
    assert (pasted[:, 0].any(-1) & ~pasted[:, -1].any(-1)).any()  # cut off at the border
    assert pasted.mean(0).max() - pasted.mean(0).min() < 0.35


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.75, 1.0])
def test_cutmix_box_is_that_of_the_paper(lam):
    """Side over side as the image's, area at most 1 - lambda, centre uniform over the pixels."""
    height, width = 12, 9
    box = jax.vmap(lambda key: cutmix_box(key, (height, width), jnp.float32(lam)))(
        jax.random.split(jax.random.key(1), 1500)
    )
    heights, widths = box.max(2).sum(1), box.max(1).sum(1)
    full = int(height * (1 - lam) ** 0.5), int(width * (1 - lam) ** 0.5)
    assert (heights.max(), widths.max()) == full
    assert heights.min() >= full[0] // 2
    if lam == 0.75:
        assert full == (6, 4)
        # The box is whole for 7 of 12 centres along the height, and for 6 of 9 along the width.
        assert abs((heights == 6).mean() - 7 / 12) < 6 * 0.5 / 1500**0.5
        assert abs((widths == 4).mean() - 6 / 9) < 6 * 0.5 / 1500**0.5


def test_probability_and_switch():
    share, kept = shares(
        Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, prob=0.6, switch_prob=0.25), (12, 9)
    )
    np.testing.assert_allclose(kept, share.mean((1, 2)), rtol=0, atol=1e-6)
    unmixed = kept == 1
    cut = (share.min((1, 2)) == 0) & (share.max((1, 2)) == 1)
    up = ~(unmixed | cut) & (share.min((1, 2)) == share.max((1, 2)))
    assert abs(up.mean() - 0.6 * 0.75) < 6 * 0.5 / 2000**0.5
    assert 0.6 * 0.25 - 0.06 < cut.mean() < 0.6 * 0.25 + 0.03  # a box may be empty, or everything


def test_nothing_asked_for_changes_nothing():
    batch, targets = images(), soft_labels(LABELS, 5)
    found, found_targets = mix(jax.random.key(0), batch, targets, Mixup())
    assert found is batch
    assert found_targets is targets


@pytest.mark.slow
@pytest.mark.parametrize("settings", [BOTH, Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, group_size=2)])
def test_one_device_and_eight_mix_alike(settings):
    batch, targets = images(16), soft_labels(jnp.tile(LABELS, 2), 5, 0.1)
    mesh = make_mesh()
    assert mesh.size == 8
    rows = batch_sharding(mesh)
    sharded = jax.jit(
        functools.partial(mix, settings=settings),
        in_shardings=(replicated(mesh), rows, rows),
        out_shardings=(rows, rows),
    )
    for seed in range(4):
        key = jax.random.key(seed)
        one = mixed(key, batch, targets, settings)
        eight = sharded(key, jax.device_put(batch, rows), jax.device_put(targets, rows))
        for expected, found in zip(one, eight, strict=True):
            assert len(found.sharding.device_set) == 8
            np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("rows", "local"), [(4, True), (8, True), (16, False), (0, False)])
def test_groups_within_a_device_are_mixed_without_communication(rows, local):
    mesh = make_mesh()
    sharding = batch_sharding(mesh)
    sharded = jax.jit(
        functools.partial(mix, settings=Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, group_size=rows)),
        in_shardings=(replicated(mesh), sharding, sharding),
        out_shardings=(sharding, sharding),
    )
    with jax.set_mesh(mesh):
        lowered = sharded.lower(
            jax.random.key(0),
            jax.ShapeDtypeStruct((64, 6, 5, 3), jnp.float32),
            jax.ShapeDtypeStruct((64, 5), jnp.float32),
        )
    sent = collectives(read_program(lowered.compile().as_text()))
    assert (not sent) == local, sent


def test_micro_batches_of_a_mixed_batch_hold_what_the_batch_holds():
    batch = dict(
        zip(
            ("image", "target"),
            mix(jax.random.key(1), images(), soft_labels(LABELS, 5), BOTH),
            strict=True,
        )
    )

    def correlation(part):
        return jnp.einsum("bhwc,bk->hwck", part["image"], part["target"]) / len(part["image"])

    whole = correlation(batch)
    for count in (2, 4):
        parts = mean_over_micro_batches(correlation, batch, count)
        np.testing.assert_allclose(parts, whole, rtol=0, atol=1e-5)


def test_the_dtype_of_the_images_stays():
    found, targets = mixed(
        jax.random.key(3), images().astype(jnp.bfloat16), soft_labels(LABELS, 5), BOTH
    )
    assert found.dtype == jnp.bfloat16
    assert targets.dtype == jnp.float32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup_alpha": -0.1}, "alpha of mixup must be 0 .none. or more, not -0.1"),
        ({"cutmix_alpha": -1.0}, "alpha of cutmix"),
        ({"prob": 1.5}, "prob of mixup must be from 0 to 1, not 1.5"),
        ({"switch_prob": -0.5}, "switch_prob of mixup must be from 0 to 1, not -0.5"),
        ({"group_size": -2}, "even number, or 0 for the whole batch, not -2"),
        ({"group_size": 63}, "even number"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(UserError, match=message):
        Mixup(**settings)
