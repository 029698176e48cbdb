"""What a config asks of the step: mixing, teachers, frozen parts, phases, each seen in the step's own results."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model, save_pretrained
from cait_jax.augment.mixup import Mixup
from cait_jax.augment.pipeline import Augmentation, normalise
from cait_jax.augment.randaugment import parse_policy
from cait_jax.sharding import batch_sharding, make_mesh, put_batch, replicated
from cait_jax.train.objectives.distillation import (
    hard_distillation,
    make_teacher,
    soft_distillation,
    teacher_from_config,
)
from cait_jax.train.objectives.supervised import Supervised, cross_entropy
from cait_jax.train.optimizer import make_optimizer
from cait_jax.train.setup import build
from cait_jax.train.step import create_state, make_train_step
from configs import digits

CLASSES = 3
MEAN, STD = (0.5,), (0.25,)


def small(**overrides):
    attributes = {"depth": 1, "width": 16, "num_heads": 2, "in_channels": 3, **overrides}
    return create_model("cait_nano4_patch4_8", num_classes=CLASSES, **attributes)


def batch_of(count=16, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8),
        "label": rng.integers(0, CLASSES, count, dtype=np.int32),
    }


def one_step(model, settings, devices=1, grad_accum=1, teacher=None, beside=None):
    """Metrics of a step, and the parameters before and after."""
    schedule = lambda step: 1e-2  # noqa: E731
    optimizer = make_optimizer(schedule)
    mesh = make_mesh(jax.devices()[:devices])
    whole, rows = replicated(mesh), batch_sharding(mesh)
    objective = Supervised(model, **settings, teacher=teacher)
    params = random_params(model)
    step = jax.jit(
        make_train_step(optimizer, schedule, grad_accum=grad_accum),
        in_shardings=(whole, rows, whole),
        out_shardings=whole,
    )
    state = jax.device_put(create_state(params, optimizer, ema=False), whole)
    batch = put_batch(batch_of() | (beside or {}), rows)
    state, metrics = step(state, batch, jax.device_put(objective, whole))
    return jax.device_get(metrics), params, jax.device_get(state.params)


PLAIN = {"label_loss": cross_entropy, "mean": MEAN, "std": STD}
WHOLE = {
    "label_loss": cross_entropy,
    "mean": MEAN,
    "std": STD,
    "augmentation": Augmentation(hflip=True, rand_augment=parse_policy("rand-m9-mstd0.5-inc1")),
    "reprob": 0.5,
    "smoothing": 0.1,
    "mixing": Mixup(mixup_alpha=0.8, cutmix_alpha=1.0),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "mix_rows", [0, 6]
)  # 6: of 16 rows two groups, and one of the four that remain
def test_the_whole_recipe_is_the_same_on_any_devices_and_in_micro_batches(mix_rows):
    mixing = dataclasses.replace(WHOLE["mixing"], group_size=mix_rows)
    settings = WHOLE | {"mixing": mixing}
    one, *_ = one_step(small(), settings)
    other, *_ = one_step(small(), settings, devices=4, grad_accum=2)
    assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert other["accuracy"] == one["accuracy"]
    plain, *_ = one_step(small(), PLAIN)
    assert abs(plain["loss"] - one["loss"]) > 1e-3


def teacher_and_its_choice():
    """A teacher of another size and normalisation, in float32, and the classes it would choose."""
    model = small(image_size=16, precision="highest")
    variables = {"params": random_params(model, seed=5)}
    teacher = make_teacher(
        model, variables, mean=(0.4,), std=(0.3,), student_mean=MEAN, student_std=STD,
        num_classes=CLASSES, dtype=jnp.float32,
    )  # fmt: skip
    images = jnp.asarray(batch_of()["image"])
    seen = jax.image.resize(normalise(images, (0.4,), (0.3,)), (16, 16, 16, 3), "cubic")
    return teacher, np.argmax(model.apply(variables, seen), axis=-1)


@pytest.mark.slow
@pytest.mark.parametrize("two_heads", [False, True])
def test_a_student_learns_label_and_teacher_in_equal_parts(two_heads):
    options = (
        {"class_token": "input", "residual": "plain", "talking_heads": False, "distilled": True}
        if two_heads
        else {}
    )
    model = small(**options, precision="highest")
    teacher, chosen = teacher_and_its_choice()
    settings = PLAIN | {"teacher_loss": hard_distillation}
    metrics, params, _ = one_step(model, settings, teacher=teacher)

    batch = batch_of()
    images = normalise(jnp.asarray(batch["image"]), MEAN, STD)
    logits, state = model.apply({"params": params}, images, mutable=["intermediates"])
    inside = state["intermediates"]
    heads = (inside["logits_class"], inside["logits_distillation"]) if two_heads else [logits] * 2
    of_label, of_teacher = (np.log(np.asarray(jax.nn.softmax(head), np.float64)) for head in heads)
    rows = np.arange(len(chosen))
    expected = -(of_label[rows, batch["label"]] + of_teacher[rows, chosen]).mean() / 2
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["accuracy"] == (of_label.argmax(-1) == batch["label"]).mean()


@pytest.mark.slow
def test_recorded_logits_teach_as_their_teacher_would_and_mix_with_the_images():
    model = small(precision="highest")
    teacher, chosen = teacher_and_its_choice()
    settings = PLAIN | {"teacher_loss": hard_distillation}
    present, *_ = one_step(model, settings, teacher=teacher)
    says = np.eye(CLASSES, dtype=np.float16)[chosen] * 9
    recorded, *_ = one_step(model, settings, beside={"teacher": says})
    assert recorded["loss"] == pytest.approx(present["loss"], rel=1e-5)

    # With the labels as the teacher's words, soft distillation at temperature 1 is the label's own loss,
    # mixed as the images are.
    says = np.eye(CLASSES, dtype=np.float32)[batch_of()["label"]] * 60
    mixing = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0)
    soft = functools.partial(soft_distillation, temperature=1.0, weight=1.0)
    taught = PLAIN | {"teacher_loss": soft, "mixing": mixing}
    alone = PLAIN | {"mixing": mixing}
    learnt, *_ = one_step(model, taught, beside={"teacher": says})
    plain, *_ = one_step(model, alone)
    assert learnt["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-4)
    assert learnt["loss"] < plain["loss"]  # by the entropy of the mixed labels


def config_of(**overrides):
    config = digits.get_config()
    config.batch_size = 64
    config.model.depth = config.model.class_depth = 1
    config.model.width = 16
    config.model.num_heads = 2
    for key, value in overrides.items():
        section, name = key.split("__")
        config[section][name] = value
    return config


def steps_of(config, count):
    """(parameters before each step and after the last, learning rates)."""
    trainer = build(config)
    state, batches = trainer.init_state(), trainer.train_batches()
    found, rates = [jax.device_get(state.params)], []
    for _ in range(count):
        state, metrics = trainer.train_step(
            state, put_batch(next(batches), batch_sharding(trainer.mesh))
        )
        found.append(jax.device_get(state.params))
        rates.append(float(metrics["learning_rate"]))
    return found, rates


def moved(before, after):
    return {
        name for name in before
        if not jax.tree.all(jax.tree.map(np.array_equal, before[name], after[name]))
    }  # fmt: skip


@pytest.mark.slow
def test_a_frozen_backbone_keeps_its_bits_and_slow_layers_move_less():
    (before, after), _ = steps_of(config_of(optimizer__train="head"), 1)
    assert moved(before, after) == {"head"}
    (before, after), _ = steps_of(config_of(optimizer__layer_decay=0.1), 1)

    def distance(name, leaf="kernel"):
        a, b = before, after
        for key in name:
            a, b = a[key], b[key]
        return np.abs(a[leaf] - b[leaf]).max()

    # AdamW's first step is about the learning rate, whatever the gradient.
    assert distance(("head",)) > 5 * distance(("blocks", "mlp", "fc1")) > 0


@pytest.mark.slow
def test_two_phases_free_the_last_blocks_after_the_head():
    steps_per_epoch = 1437 / 64
    config = config_of(
        phases__head_epochs=2 / steps_per_epoch,
        phases__blocks_epochs=2 / steps_per_epoch,
        phases__blocks=1,
    )
    assert build(config).total_steps == 4
    params, rates = steps_of(config, 3)
    assert moved(params[0], params[1]) == moved(params[1], params[2]) == {"head"}
    assert moved(params[2], params[3]) == {"head", "norm", "blocks_token_only_0"}
    assert rates == pytest.approx([1e-3, 1e-3, 1e-5])


@pytest.mark.slow
def test_a_config_names_its_teacher(tmp_path):
    teacher = create_model("cait_nano4_patch4_8", depth=1, width=16, num_heads=2, num_classes=10)
    settings = {
        "image_size": [8, 8], "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 1
    }  # fmt: skip
    save_pretrained(
        tmp_path / "t", teacher, {"params": random_params(teacher)}, preprocessing=settings
    )
    config = config_of(distill__kind="soft", distill__teacher=str(tmp_path / "t"))
    (before, after), _ = steps_of(config, 1)
    assert "blocks" in moved(before, after)
    config = config_of(distill__kind="hard", distill__teacher="cait_s48")
    with pytest.raises(UserError, match="the teacher knows 1000 classes and the student 10"):
        build(config)
    with pytest.raises(UserError, match="no weights were released for cait_s48"):
        teacher_from_config(config, create_model("cait_xxs24"))


def test_rows_of_recorded_logits_come_with_their_examples(tmp_path):
    logits = np.random.default_rng(0).standard_normal((1437, 10)).astype(np.float32)
    np.savez(tmp_path / "logits.npz", logits=logits)
    config = config_of(distill__kind="soft", distill__logits=str(tmp_path / "logits.npz"))
    trainer = build(config)
    with trainer.train_batches() as batches:
        batch = next(batches)
    assert set(batch) == {"image", "label", "teacher"}
    for image, row in zip(batch["image"], batch["teacher"], strict=True):
        (index,) = np.flatnonzero((logits == row).all(axis=1))
        np.testing.assert_array_equal(trainer.train_split.images[index], image)
    with pytest.raises(UserError, match="nothing learns from it: set"):
        build(config_of(distill__logits=str(tmp_path / "logits.npz")))


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"loss__name": "softmx"},
            "loss.name is softmx and must be one of softmax, binary; nearest: softmax",
        ),
        (
            {"loss__target_threshold": 0.5},
            "loss.target_threshold goes with --config.loss.name=binary, not softmax",
        ),
        (
            {"distill__kind": "harder"},
            "distill.kind is harder and must be one of none, hard, soft; nearest: hard",
        ),
        (
            {"optimizer__name": "adam"},
            "optimizer.name is adam and must be one of .*; nearest: adamw",
        ),
        ({"optimizer__train": "7"}, "no part 7: set --config.optimizer.train to"),
        ({"augment__rand_augment": "rand-m9-x1-inc1"}, "x1"),
        (
            {"augment__mixup": -1.0},
            "augment.mixup is -1.0 and must be a finite number of at least 0.001 and at most 1,000, or 0",
        ),
        ({"optimizer__layer_decay": 0.0}, "layer_decay is 0.0 and must be a finite number in"),
        ({"data__aug_repeats": 0}, "data.aug_repeats is 0 and must be a whole number of 1 or more"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_compiled(overrides, sentence):
    with pytest.raises(UserError, match=sentence):
        build(config_of(**overrides))
