"""Networks and the training step, whole and in pieces, under JAX's default mesh, whose axes are explicit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from trees import random_params

import cait_jax
from cait_jax.augment import mixup, pipeline
from cait_jax.augment.randaugment import parse_policy
from cait_jax.sharding import positions
from cait_jax.train import setup
from cait_jax.train.objectives import supervised
from cait_jax.train.objectives.distillation import soft_distillation
from cait_jax.train.step import make_train_step
from configs import digits

NETWORKS = {
    "stacked": {"drop_path_rate": 0.2, "dropout": 0.2},
    "token_at_block_1": {"class_token": 1, "class_depth": 0, "talking_heads": False},
    "mean": {"class_token": "mean", "class_depth": 0, "attention": "xla"},
    "remat": {"remat": "block", "residual": "fixup"},
}


def sharded(tree, mesh, spec):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def largest_difference(tree, other):
    differences = jax.tree.map(
        lambda a, b: np.abs(np.float64(a) - np.float64(b)).max(), tree, other
    )
    return max(jax.tree.leaves(differences))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("options", NETWORKS.values(), ids=NETWORKS)
def test_a_network_is_the_same_on_a_mesh_forward_and_backward(options, devices, axes):
    model = cait_jax.create_model("cait_nano4_patch4_8", num_classes=10, depth=2, **options)
    images = jax.random.normal(jax.random.key(0), (8, 8, 8, 1))
    variables = model.init(jax.random.key(1), images[:1])

    def loss(variables, images):
        rngs = {"dropout": jax.random.key(2), "drop_path": jax.random.key(3)}
        return (model.apply(variables, images, train=True, rngs=rngs) ** 2).sum()

    expected = jax.jit(model.apply)(variables, images), jax.jit(jax.grad(loss))(variables, images)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        variables = sharded(variables, mesh, PartitionSpec())
        images = sharded(images, mesh, PartitionSpec("data"))
        found = jax.jit(model.apply)(variables, images), jax.jit(jax.grad(loss))(variables, images)
    assert found[0].sharding.spec[0] == "data"
    assert largest_difference(found, expected) < 1e-5


MIXED = mixup.Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
RANDOM = pipeline.Augmentation(rand_augment=parse_policy("rand-m9-mstd0.5-inc1"))
PIECES = {
    f"mixed in groups of {rows}": lambda key, images, rows=rows: mixup.mix(
        key, images, images[:, 0, 0], dataclasses.replace(MIXED, group_size=rows)
    )
    for rows in (0, 4, 6, 8)
} | {
    "augmented": lambda key, images: pipeline.augment(
        key, jnp.round(255 * images), positions(images), RANDOM
    ),
    "erased": lambda key, images: pipeline.random_erase(key, images, positions(images), 0.5),
    "binary": lambda key, images: supervised.binary_cross_entropy(
        images[:, 0, 0], images[:, 1, 1], 0.5
    ),
    "taught": lambda key, images: soft_distillation(
        supervised.cross_entropy(images[:, 0, 0], images[:, 1, 1]), images[:, 0, 0], images[:, 2, 2]
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize("devices", [2, 8])
@pytest.mark.parametrize("piece", PIECES.values(), ids=PIECES)
def test_a_piece_of_the_step_is_the_same_on_a_mesh_forward_and_backward(piece, devices, axes):
    key, images = jax.random.key(0), jax.random.uniform(jax.random.key(1), (16, 8, 8, 3))

    def total(images):
        return sum(leaf.sum() for leaf in jax.tree.leaves(piece(key, images)))

    def both(images):
        return piece(key, images), jax.grad(total)(images)

    expected = jax.jit(both)(images)
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(axes,))
    with jax.set_mesh(mesh):
        found = jax.jit(both)(sharded(images, mesh, PartitionSpec("data")))
    assert largest_difference(found, expected) < 1e-5


STEPS = {
    "plain": {},
    "accumulated": {"optimizer.grad_accum": 2},
    "sam": {"optimizer.sam_rho": 0.05},
    "lamb": {"optimizer.name": "lamb"},
    "lion": {"optimizer.name": "lion"},
    "muon": {"optimizer.name": "muon"},
    "sgd": {"optimizer.name": "sgd"},
    "head": {"optimizer.train": "head"},
    "layer_decay": {"optimizer.layer_decay": 0.7},
    "phases": {"phases.head_epochs": 1.0, "phases.blocks": 1},
    "soft": {"distill.kind": "soft"},
    "hard": {"distill.kind": "hard"},
}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A saved network that knows the digits' classes."""
    folder = tmp_path_factory.mktemp("teacher") / "saved"
    model = cait_jax.create_model(
        "cait_nano4_patch4_8", num_classes=10, depth=1, width=16, num_heads=2
    )
    cait_jax.save_pretrained(
        folder,
        model,
        {"params": random_params(model)},
        label_names=[str(digit) for digit in range(10)],
        preprocessing=cait_jax.Preprocessing((8, 8), mean=(0.5,), std=(0.5,), channels=1),
    )
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize("settings", STEPS.values(), ids=STEPS)
def test_a_step_is_the_same_under_explicit_axes(settings, teacher):
    config = digits.get_config()
    config.batch_size = 16
    config.augment.update(mixup=0.8, cutmix=1.0, mix_rows=4, reprob=0.25)
    config.model.drop_path_rate = 0.2
    config.model.update(depth=1, width=16, class_depth=1, num_heads=2)
    config.optimizer.update(ema_decay=0.9)
    config.distill.teacher = teacher
    config.update_from_flattened_dict(settings)
    trainer = setup.build(config, jax.devices()[:1])
    optimizer = trainer.optimizer
    step = jax.jit(
        make_train_step(
            optimizer.transformation, optimizer.schedule,
            grad_accum=config.optimizer.grad_accum, ema_decay=0.9,
            sam_rho=config.optimizer.sam_rho, freeze=optimizer.freeze,
        )
    )  # fmt: skip
    state, objective = jax.device_get((trainer.init_state(), trainer.objective))
    with trainer.train_batches() as batches:
        batch = next(batches)
    expected = step(state, batch, objective)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
    with jax.set_mesh(mesh):
        state, objective = sharded((state, objective), mesh, PartitionSpec())
        found = step(state, sharded(batch, mesh, PartitionSpec("data")), objective)
    # The moments hold the gradients; a first update is their sign, which rounding decides where one is 0.
    # Teachers compute in bfloat16.
    bound = 1e-3 if "distill.kind" in settings else 1e-5
    assert largest_difference(found[0].opt_state, expected[0].opt_state) < bound
    assert largest_difference(found[1], expected[1]) < bound
    assert largest_difference(found[0].params, state.params) > 0


def test_positions_count_the_batch():
    assert positions(jnp.zeros((3, 2))).tolist() == [0, 1, 2]
