"""Meshes of eight simulated devices: the same numbers on each, and what they send each other."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from marks import slow_unless
from trees import assert_same_bits

from cait_jax import UserError
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.plan.compile import trace
from cait_jax.plan.hlo import collectives, read_program, totals
from cait_jax.sharding import batch_sharding, leaf_shapes, make_mesh, param_shardings, put_batch
from cait_jax.train.setup import build
from configs import digits

MESHES = [(8, 1, 1), (1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 2, 2), (1, 2, 4)]
# Half of the eight combinations, in which every pair of choices occurs: network, stacked, micro batches.
NETWORKS = [
    ("cait_nano4_patch4_8", True, 1),
    ("cait_nano4_patch4_8", False, 2),
    ("vit_6x256", True, 2),
    ("vit_6x256", False, 1),
]
# All of them where every axis divides something, and on the other meshes one of each kind.
PAIRS = [(network, (2, 2, 2)) for network in NETWORKS] + [
    (NETWORKS[number], mesh)
    for mesh, numbers in {
        (8, 1, 1): (1, 2),
        (1, 8, 1): (0, 3),
        (2, 4, 1): (1, 2),
        (4, 1, 2): (0, 3),
        (1, 2, 4): (1, 2),
    }.items()
    for number in numbers
]
# Stacked or not: kind to (how often, bytes that each device has from it) of a training step. The gradient norm is
# reduced twice: the step asks whether it is finite, then it clips.
GOLDEN = {
    True: {"all-gather": (51, 560_896), "all-reduce": (21, 311_624)},
    False: {"all-gather": (43, 495_360), "all-reduce": (33, 311_720)},
}


def small(name="cait_nano4_patch4_8", *, mesh=(-1, 1, 1), stacked=True, accumulate=1, depth=2):
    config = digits.get_config()
    config.batch_size = 32
    config.steps = 20
    config.model.name = name
    config.model.depth, config.model.width, config.model.num_heads = depth, 32, 4
    config.model.patch_size = 4
    config.model.drop_path_rate, config.model.dropout = 0.2, 0.1
    config.model.stacked = stacked
    config.model.precision = "highest"
    config.optimizer.grad_accum = accumulate
    config.optimizer.learning_rate = 1e-2
    config.optimizer.warmup_epochs = 0.0
    config.optimizer.ema_decay = 0.9
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    return config


def losses(config, devices, steps):
    """The losses of the first steps, and the state after them."""
    trainer = build(config, devices)
    state = trainer.init_state()
    found = []
    with trainer.train_batches() as batches:
        for _ in range(steps):
            state, metrics = trainer.train_step(
                state, put_batch(next(batches), batch_sharding(trainer.mesh))
            )
            found.append(float(metrics["loss"]))
    return found, state


def in_float64(network, mesh, count):
    name, stacked, accumulate = network
    config = small(name, mesh=mesh, stacked=stacked, accumulate=accumulate)
    if name.startswith("cait"):
        config.model.class_depth = 1
    config.model.dtype = config.model.param_dtype = "float64"
    with jax.enable_x64(True):
        found, state = losses(config, jax.devices()[:count], 3)
        return found, jax.device_get(state.params)


alone_in_float64 = functools.cache(lambda network: in_float64(network, (1, 1, 1), 1))


@pytest.mark.parametrize(
    ("network", "mesh"),
    slow_unless(lambda network, mesh: network == NETWORKS[2] and mesh == (2, 4, 1), PAIRS),
    ids=str,
)
def test_float64_agrees_to_its_rounding_on_every_mesh(network, mesh):
    expected, expected_params = alone_in_float64(network)
    found, params = in_float64(network, mesh, 8)
    np.testing.assert_allclose(found, expected, rtol=1e-13, atol=0)
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(expected_params), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_float32_losses_agree_over_twenty_steps():
    expected, _ = losses(small(), jax.devices()[:1], 20)
    found, _ = losses(small(mesh=(2, 2, 2)), jax.devices(), 20)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_optimiser_state_and_ema_are_sharded_as_their_parameters():
    trainer = build(small(mesh=(2, 2, 2)))
    state = trainer.abstract_state
    specs = jax.tree.map(lambda leaf: leaf.sharding.spec, state)
    stacked, unrolled = P(None, "fsdp", "tensor"), P("tensor", "fsdp")
    assert specs.params["blocks"]["mlp"]["fc1"]["kernel"] == stacked
    assert specs.ema["blocks"]["mlp"]["fc1"]["kernel"] == stacked
    assert specs.params["blocks_token_only_0"]["attn"]["proj"]["kernel"] == unrolled
    assert specs.params["blocks"]["attn"]["proj_l"]["kernel"] == P()
    assert specs.params["norm"]["scale"] == P()
    moments = [
        leaf.sharding.spec
        for leaf in jax.tree.leaves(state.opt_state)
        if leaf.shape == state.params["blocks"]["mlp"]["fc1"]["kernel"].shape
    ]
    assert moments == [stacked, stacked]


@pytest.mark.slow
def test_a_checkpoint_of_one_mesh_is_read_on_every_other(tmp_path):
    """Bit for bit, with the shardings of the other mesh."""
    state = build(small(mesh=(1, 4, 2))).init_state()
    with Checkpoints(tmp_path, keep=1, best_metric="eval/accuracy") as checkpoints:
        checkpoints.save(1, state, {}, None)
    for mesh in MESHES:
        template = build(small(mesh=mesh)).abstract_state
        with Checkpoints(tmp_path, keep=1, best_metric="eval/accuracy") as checkpoints:
            step, found, _ = checkpoints.restore(template)
        assert step == 1
        assert_same_bits(found, state)
        same = jax.tree.map(lambda leaf, like: leaf.sharding == like.sharding, found, template)
        assert all(jax.tree.leaves(same))


def test_an_axis_that_does_not_divide_is_not_sharded():
    tree = {"head": {"kernel": np.zeros((32, 10)), "bias": np.zeros(10)}}
    shardings = param_shardings(tree, make_mesh(fsdp=1, tensor=4))
    assert shardings["head"]["kernel"].spec == P("fsdp", None)
    assert shardings["head"]["bias"].spec == P(None)


def compiled_step(config, devices=None):
    trainer = build(config, devices)
    return trace(trainer).lower().compile().as_text(), trainer.abstract_state


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [True, False])
def test_under_fsdp_parameters_are_gathered_one_by_one(stacked):
    """No gathered array holds more than one layer. Only scans and MLPs gather again in the backward pass."""
    text, state = compiled_step(small(mesh=(1, 8, 1), depth=4, stacked=stacked))
    exchanged = collectives(read_program(text))
    gathered = [each for each in exchanged if each.kind == "all-gather"]
    largest_layer = 32 * 128 * 4
    assert max(each.bytes for each in gathered) == largest_layer
    whole = {
        shape.split(" ", 1)[1] for shape in leaf_shapes(state.params).values() if "(4, " in shape
    }
    assert not whole & {array for each in gathered for array in each.arrays}
    assert totals(exchanged) == GOLDEN[stacked]


@pytest.mark.slow
def test_one_device_sends_nothing():
    text, _ = compiled_step(small(), jax.devices()[:1])
    assert collectives(read_program(text)) == []


@pytest.mark.slow
def test_data_parallel_devices_sum_gradients_and_nothing_more():
    text, state = compiled_step(small(mesh=(8, 1, 1)))
    found = totals(collectives(read_program(text)))
    gradients = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params))
    assert set(found) == {"all-reduce"}
    assert gradients <= found["all-reduce"][1] <= 1.1 * gradients


@pytest.mark.parametrize(
    ("sizes", "sentence"),
    [
        (
            {"data": 3},
            "mesh.data=3, --config.mesh.fsdp=1, --config.mesh.tensor=1 does not fit 8 device",
        ),
        ({"fsdp": 3}, "leave --config.mesh.data=-1 to fill what is left"),
        ({"fsdp": -1}, "one of them may be -1"),
        ({"tensor": 0}, "every size must be 1 or more"),
    ],
)
def test_sizes_that_make_no_mesh(sizes, sentence):
    with pytest.raises(UserError, match=sentence):
        make_mesh(**sizes)


def test_one_size_fills():
    assert dict(make_mesh(data=2, fsdp=-1, tensor=2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
