"""RandAugment's operations against results of timm 1.0.31 with Pillow 13.0.0, and its draws.

`fixtures/randaugment.npz` holds an image, and what each operation of timm's increasing set, applied for certain
(bicubic, fill (124, 116, 104)), makes of it at each of the magnitudes.
"""

import collections
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cait_jax.augment.pipeline import per_example_vmap
from cait_jax.augment.randaugment import (
    OPERATIONS,
    RandAugment,
    apply_operation,
    parse_policy,
    rand_augment,
    sample_operation,
)
from cait_jax.errors import UserError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "randaugment.npz"
# The factors 1 + 0.9 s, and places in the image, are float64 in timm, and a product that is an integer there
# can be rounded down here. Exact for a given factor: test_operations.py.
EXACT = {"equalize", "invert", "posterize", "solarize", "solarize_add"}
apply_jitted = jax.jit(apply_operation)


def test_every_operation_gives_what_timm_gives():
    recorded = np.load(FIXTURE)
    assert set(recorded["operations"]) == set(OPERATIONS)
    for name, results in zip(recorded["operations"], recorded["results"], strict=True):
        for magnitude, expected in zip(recorded["magnitudes"], results, strict=True):
            found = apply_jitted(recorded["image"], OPERATIONS.index(name), magnitude)
            difference = np.abs(np.asarray(found).astype(int) - expected)
            tolerance, share = (0, 0) if name in EXACT else (1, 0.05)
            assert difference.max() <= tolerance, (name, magnitude)
            assert (difference > 0).mean() <= share, (name, magnitude)


def test_strength_is_that_of_whole_magnitudes_and_never_beyond_the_limit():
    ramp = np.arange(240, dtype=np.uint8).reshape(20, 12)[:, ::-1, None]
    ramp = np.broadcast_to(np.resize(ramp, (20, 24, 1)), (20, 24, 3))
    for magnitude in range(11):
        solarized = apply_jitted(ramp, OPERATIONS.index("solarize"), float(magnitude))
        threshold = 256 - int(magnitude / 10 * 256)
        np.testing.assert_array_equal(solarized, np.where(ramp < threshold, ramp, 255 - ramp))
        added = apply_jitted(ramp, OPERATIONS.index("solarize_add"), float(magnitude))
        addend = int(magnitude / 10 * 110)
        np.testing.assert_array_equal(added, np.where(ramp < 128, ramp + addend, ramp))
        posterized = apply_jitted(ramp, OPERATIONS.index("posterize"), float(magnitude))
        dropped = 4 + int(magnitude / 10 * 4)
        np.testing.assert_array_equal(posterized, ramp.astype(int) >> dropped << dropped)
    np.testing.assert_array_equal(apply_jitted(ramp, len(OPERATIONS), 9.0), ramp)


def test_draws():
    policy = RandAugment(magnitude=9.0, magnitude_std=0.5, prob=0.3)
    operations, applied, magnitudes = jax.vmap(lambda key: sample_operation(key, policy))(
        jax.random.split(jax.random.key(0), 6000)
    )
    counts = collections.Counter(np.asarray(operations).tolist())
    assert set(counts) == set(range(15))
    assert max(abs(count - 400) for count in counts.values()) < 6 * 20
    assert abs(np.mean(applied) - 0.3) < 6 * 0.46 / 6000**0.5
    assert abs(np.mean(magnitudes > 0) - 0.5) < 6 * 0.5 / 6000**0.5
    size = np.abs(magnitudes)
    assert size.max() == 10
    assert abs((size == 10).mean() - 0.0228) < 6 * 0.15 / 6000**0.5  # two standard deviations up
    assert abs(np.median(size) - 9) < 0.05
    assert abs((size < 8.5).mean() - 0.1587) < 6 * 0.37 / 6000**0.5


@pytest.mark.slow
def test_a_cpu_in_turn_and_other_devices_at_once_give_the_same():
    image = np.load(FIXTURE)["image"][:12, :10]
    images = jnp.stack([jnp.asarray(np.roll(image, i, axis=1)) for i in range(24)])
    policy = RandAugment(prob=0.9)
    one = functools.partial(rand_augment, policy=policy)
    key, ids = jax.random.key(1), jnp.arange(24)
    in_turn = jax.jit(functools.partial(per_example_vmap, one))(key, images, ids)
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, ids)
    at_once = jax.jit(jax.vmap(one))(keys, images)
    # A level that one of two operations rounds otherwise can be equalised or sharpened by the next.
    difference = np.abs(np.asarray(in_turn).astype(int) - np.asarray(at_once))
    assert (difference > 0).mean() < 0.01
    changed = np.any(np.asarray(in_turn) != images, axis=(1, 2, 3))
    assert changed.sum() >= 18


def test_a_policy_is_read_from_timms_notation():
    assert parse_policy("rand-m9-mstd0.5-inc1") == RandAugment(9.0, 0.5, 2, 0.5)
    assert parse_policy("rand-inc1-n3-m7.5-p0.8") == RandAugment(7.5, 0.0, 3, 0.8)
    assert parse_policy("rand-inc1") == RandAugment(10.0, 0.0, 2, 0.5)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("augmix-m3", "'augmix-m3' is not RandAugment's; write one like 'rand-m9-mstd0.5-inc1'"),
        ("", "is not RandAugment's"),
        ("rand-m9-q3-inc1", "unknown part 'q3'; the parts are m, n, p, mstd, inc"),
        ("rand-m9-inc1-", "unknown part ''"),
        ("rand-m-inc1", "unknown part 'm'"),
        ("rand-mmax20-inc1", "unknown part 'mmax20'"),
        ("rand-m9-m8-inc1", "has two parts m; leave one out"),
        ("rand-m9-mstd0.5", "must say inc1"),
        ("rand-m9-inc0", "must say inc1"),
        ("rand-m11-inc1", "has m11; m must be from 0 to 10"),
        ("rand-p1.5-inc1", "has p1.5; p must be from 0 to 1"),
        ("rand-mstd101-inc1", "has mstd101; mstd must be from 0 to 100"),
        ("rand-n0-inc1", "has n0; n must be a whole number"),
        ("rand-n1.5-inc1", "has n1.5; n must be a whole number"),
    ],
)
def test_a_policy_that_means_nothing(policy, message):
    with pytest.raises(UserError, match=message):
        parse_policy(policy)


def test_images_of_other_channels_are_refused():
    with pytest.raises(UserError, match="images of 1 or 3 channels, not 4"):
        rand_augment(jax.random.key(0), jnp.zeros((8, 8, 4), jnp.uint8), RandAugment())
