"""Where a run starts: from its own checkpoint, from weights that are given, from its seed, in this order."""

import jax
import numpy as np
import pytest
from trees import random_params

from cait_jax import UserError, create_model, load_pretrained, save_pretrained
from cait_jax.train import train
from cait_jax.train.objectives.distillation import check_teacher_classes, recorded_logits
from cait_jax.train.setup import build
from configs import digits


@pytest.fixture
def config():
    config = digits.get_config()
    config.steps = 2
    config.batch_size = 64
    config.model.depth = config.model.class_depth = 1
    config.model.width = 16
    config.model.num_heads = 2
    config.report.every_steps = 1
    return config


@pytest.fixture
def weights(tmp_path):
    """A model of the same shape with 10 classes, saved."""
    model = create_model(
        "cait_nano4_patch4_8", depth=1, class_depth=1, width=16, num_heads=2, num_classes=10
    )
    variables = {"params": random_params(model)}
    save_pretrained(tmp_path / "weights", model, variables)
    return tmp_path / "weights", variables["params"]


def same(a, b):
    return jax.tree.all(jax.tree.map(np.array_equal, a, b))


@pytest.mark.slow
def test_given_weights_come_before_the_seed_and_the_runs_own_before_them(config, weights, tmp_path):
    path, params = weights
    config.init.weights = str(path)
    state = build(config).init_state()
    assert same(state.params, params)
    assert int(state.step) == 0

    run = train(config, tmp_path / "run")
    assert not same(run.state.params, params)
    for file in path.iterdir():  # no longer needed: the run has a checkpoint of its own
        file.unlink()
    again = train(config, tmp_path / "run")
    assert same(again.state.params, run.state.params)
    _, loaded = load_pretrained(tmp_path / "run")
    assert same(loaded["params"], run.state.params)


def test_weights_of_other_classes_and_size_start_with_a_new_head(config, tmp_path, caplog):
    other = create_model(
        "cait_nano4_patch4_8", depth=1, class_depth=1, width=16, num_heads=2, num_classes=3,
        image_size=16,
    )  # fmt: skip
    params = random_params(other)
    save_pretrained(tmp_path / "other", other, {"params": params})
    config.init.weights = str(tmp_path / "other")
    with pytest.raises(UserError, match="3 classes and the model 10: give reset_head=True"):
        build(config).init_state()
    config.init.reset_head = True
    state = build(config).init_state()
    assert state.params["pos_embed"].shape == (1, 4, 16)
    assert same(state.params["blocks"], params["blocks"])
    assert "head.bias" in caplog.text


@pytest.mark.slow
def test_a_run_may_start_from_another_run(config, tmp_path):
    first = train(config, tmp_path / "first")
    config.init.weights = str(tmp_path / "first")
    assert same(build(config).init_state().params, first.state.params)


@pytest.mark.parametrize(
    ("keys", "sentence"),
    [
        ({"pretrained": True}, "no weights were released for cait_nano4_patch4_8"),
        ({"weights": "nowhere"}, "nowhere does not exist"),
        ({"weights": "x", "pretrained": True}, "both say where to start: give one"),
        ({"reset_head": True}, "go with --config.init.weights=PATH or"),
    ],
)
def test_starts_that_cannot_be_are_one_sentence(config, tmp_path, keys, sentence):
    config.init.update(keys)
    with pytest.raises(UserError, match=sentence) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_recorded_logits_are_brought_to_the_order_of_the_students_classes(config, tmp_path):
    logits = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    np.savez(tmp_path / "l.npz", logits=logits, class_names=np.array(["dog", "ant", "cat"]))
    config.distill.kind, config.distill.logits = "soft", str(tmp_path / "l.npz")
    found = recorded_logits(config, 4, ("ant", "cat", "dog"))
    np.testing.assert_array_equal(found, logits[:, [1, 2, 0]])
    np.testing.assert_array_equal(recorded_logits(config, 4, ("dog", "ant", "cat")), logits)
    with pytest.raises(
        UserError, match="are of the classes dog, ant, cat, and the student learns ant"
    ):
        recorded_logits(config, 4, ("ant", "cat", "fox"))
    np.savez(tmp_path / "l.npz", logits=logits)  # without names they are in the student's order
    np.testing.assert_array_equal(recorded_logits(config, 4, ("ant", "cat", "fox")), logits)


def test_a_teacher_of_classes_in_another_order_is_refused(config, weights, tmp_path):
    model, variables = load_pretrained(weights[0])
    digits_names = [str(i) for i in range(10)]
    config.distill.kind, config.distill.teacher = "soft", str(tmp_path / "teacher")
    for names, right in ((digits_names, True), (None, True), (digits_names[::-1], False)):
        save_pretrained(tmp_path / "teacher", model, variables, label_names=names)
        if right:
            check_teacher_classes(config, digits_names)
            continue
        with pytest.raises(
            UserError, match="knows the classes 9, 8, 7, 6 and 6 more in this order"
        ):
            check_teacher_classes(config, digits_names)
        with pytest.raises(UserError):
            build(config)


@pytest.mark.parametrize("head", [3, 0])
def test_a_teacher_of_other_classes_or_none_is_refused_before_its_weights_are_read(
    config, tmp_path, head
):
    model = create_model("cait_nano4_patch4_8", depth=1, width=16, num_heads=2, num_classes=head)
    save_pretrained(tmp_path / "teacher", model, {"params": random_params(model)}, preprocessing={
        "image_size": [8, 8], "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 1,
    })  # fmt: skip
    (tmp_path / "teacher" / "model.safetensors").unlink()
    config.distill.kind, config.distill.teacher = "soft", str(tmp_path / "teacher")
    with pytest.raises(UserError, match="knows 3 classes" if head else "no head to teach with"):
        build(config)
