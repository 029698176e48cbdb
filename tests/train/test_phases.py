"""Phases: which step has which rate and which part, and a fresh start in each."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from marks import slow_unless
from trees import random_params, stack_blocks, unstack_blocks

from cait_jax import UserError, create_model
from cait_jax.train.layer_groups import (
    Phase,
    head_then_blocks,
    in_phases,
    phase_at,
    phase_mask,
    phase_rates,
)
from cait_jax.train.optimizer import OPTIMIZERS, make_optimizer
from cait_jax.train.step import apply_updates

PHASES = (Phase(2, 1e-2, "head"), Phase(3, 1e-3, 3), Phase(1, 1e-4, "all"))


@pytest.fixture(scope="module")
def params():
    model = create_model(
        "cait_xxs24", depth=3, image_size=8, patch_size=4, width=8, num_heads=2, num_classes=3
    )
    return random_params(model)


def history(make, phases, params, steps):
    optimizer = in_phases(make, phases)

    @jax.jit
    def step(params, state):
        gradient = jax.tree.map(lambda leaf: 1 + jnp.cos(3 * leaf), params)
        updates, state = optimizer.update(gradient, state, params)
        return apply_updates(params, updates), state

    state, trees = optimizer.init(params), [params]
    for _ in range(steps):
        params, state = step(params, state)
        trees.append(params)
    return jax.device_get(trees)


def same_bits(a, b):
    return all(
        x.tobytes() == y.tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_rates_and_phases_by_step():
    rates = phase_rates(PHASES)
    expected = [1e-2, 1e-2, 1e-3, 1e-3, 1e-3, 1e-4, 1e-4]
    np.testing.assert_allclose([rates(step) for step in range(7)], expected, rtol=1e-6)
    assert [int(phase_at(PHASES, step)) for step in range(7)] == [0, 0, 1, 1, 1, 2, 2]


def test_head_then_blocks_counts_epochs_in_steps():
    head, blocks = head_then_blocks(10.3)
    assert head == Phase(52, 1e-3, "head")
    assert blocks == Phase(206 - 52, 1e-5, 4)


@pytest.mark.parametrize("name", slow_unless(lambda name: name == "sgd", OPTIMIZERS))
def test_each_phase_moves_its_part_alone_and_starts_anew(params, name):
    make = functools.partial(make_optimizer, name=name, weight_decay=0.1, clip_norm=1.0)
    trees = history(make, PHASES[:2], params, 4)
    for before, after in itertools.pairwise(trees[:3]):
        assert not same_bits(before["head"], after["head"])
        assert same_bits(before | {"head": {}}, after | {"head": {}})
    for before, after in itertools.pairwise(trees[2:]):
        for part in ("patch_embed", "cls_token", "pos_embed"):
            assert same_bits(before[part], after[part])
        for kernel in ("qkv", "proj_l"):
            old, new = (tree["blocks"]["attn"][kernel]["kernel"] for tree in (before, after))
            assert same_bits(old[:2], new[:2])
            assert not np.any(old[2] == new[2])
        for part in ("blocks_token_only_0", "blocks_token_only_1", "norm", "head"):
            assert not same_bits(before[part], after[part])

    alone = history(make, (Phase(9, 1e-3, 3),), jax.tree.map(jnp.asarray, trees[2]), 2)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-7), alone[-1], trees[4]
    )


@pytest.mark.slow
def test_stacked_and_single_blocks_go_the_same_way(params):
    make = functools.partial(make_optimizer, weight_decay=0.1)
    stacked = history(make, PHASES, params, 6)[-1]
    single = stack_blocks(history(make, PHASES, unstack_blocks(params), 6)[-1])
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-6), stacked, dict(single)
    )


def test_a_mask_that_never_changes_is_known_while_tracing(params):
    phases = head_then_blocks(1.0, blocks=2)

    @jax.jit
    def check(step):
        mask = phase_mask(phases, params, step)
        for part in ("patch_embed", "blocks", "head"):
            leaves = jax.tree.leaves(mask[part])
            assert all(isinstance(leaf, np.ndarray) for leaf in leaves)
            assert all(np.all(leaf == (part == "head")) for leaf in leaves)
        return mask["norm"]["scale"]

    assert [bool(check(step)) for step in (0, 4, 5, 99)] == [False, False, True, True]


@pytest.mark.parametrize("phases", [(), (Phase(0, 1e-3),), (Phase(3, 1e-3), Phase(0, 1e-3))])
def test_phases_that_make_no_run(phases):
    with pytest.raises(UserError, match="at least 1 step"):
        in_phases(make_optimizer, phases)


@pytest.mark.parametrize(
    ("head_epochs", "blocks_epochs", "steps"),
    [(0.25, 0.75, [1, 1]), (0.01, 0.01, [1, 1]), (2.0, 0.1, [2, 1]), (1.4, 1.4, [1, 2])],
)
def test_a_phase_has_a_step_however_short(head_epochs, blocks_epochs, steps):
    phases = head_then_blocks(1.0, head_epochs=head_epochs, blocks_epochs=blocks_epochs)
    assert [phase.steps for phase in phases] == steps
    in_phases(make_optimizer, phases)


def test_no_epochs_are_no_steps():
    phases = head_then_blocks(1.0, head_epochs=0.0, blocks_epochs=3.0)
    assert [phase.steps for phase in phases] == [0, 3]
