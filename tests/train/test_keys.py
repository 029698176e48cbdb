"""Settings that exclude each other are refused in one sentence, before anything is made."""

import pytest

from cait_jax import UserError
from cait_jax.train.config import check_values
from configs import common, digits

JITTER = {"augment.color_jitter": 0.3}
THREE = {"augment.three_augment": True}
PLAIN = {"augment.rand_augment": ""}
PHASES = {"phases.head_epochs": 5.0}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (THREE, "three_augment replaces RandAugment, which is on"),
        (JITTER, "color_jitter has no place beside RandAugment"),
        ({"augment.mix_rows": 63}, "must be even, or 0 for the whole batch"),
        ({"distill.weights": "teacher.pth"}, "distill.weights is given and nothing learns from it"),
        (
            {"distill.kind": "hard", "distill.weights": "a.pth", "distill.logits": "a.npz"},
            "give one",
        ),
        ({"optimizer.decay_epochs": 10.0}, "are for --config.optimizer.schedule=step"),
        ({"optimizer.decay_rate": 0.5}, "are for --config.optimizer.schedule=step"),
        (PHASES | {"optimizer.train": "head"}, "both say what learns"),
        (PHASES | {"optimizer.layer_decay": 0.75}, "layer_decay has no effect on phases"),
        (
            {"model.residual": "rezero", "model.layer_scale_init": 0.1},
            "residual=layerscale or scalar",
        ),
        ({"optimizer.nesterov": True, "optimizer.momentum": 0.0}, "nesterov needs momentum"),
    ],
)
def test_what_would_have_no_effect_is_refused(settings, sentence):
    config = common.get_config()
    config.update_from_flattened_dict(settings)
    with pytest.raises(UserError, match=sentence) as caught:
        check_values(config)
    message = str(caught.value)
    assert "\n" not in message
    assert all(f"--config.{key}" in message or key == "distill.kind" for key in settings)


@pytest.mark.parametrize(
    "settings",
    [
        THREE | PLAIN,
        JITTER | PLAIN,
        THREE | JITTER | PLAIN,
        PHASES,
        {"optimizer.schedule": "step", "optimizer.decay_epochs": 10.0},
        {"optimizer.layer_decay": 0.75, "optimizer.train": "4"},
        {"model.residual": "scalar", "model.layer_scale_init": 0.1},
        {"distill.kind": "soft", "distill.weights": "teacher.pth"},
        {"optimizer.name": "sgd", "optimizer.nesterov": True},
    ],
)
def test_what_goes_together_passes(settings):
    config = common.get_config()
    config.update_from_flattened_dict(settings)
    check_values(config)


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("optimizer.eps", 0.0, r"a finite number in \(0, 1\]"),
        ("optimizer.grad_clip_norm", -1.0, "a finite number of at least 0 and at most 1,000,000"),
        ("optimizer.decay_epochs", 0.0, "a finite number above 0"),
        ("optimizer.decay_rate", 1.5, r"a finite number in \[0.001, 1\]"),
        ("distill.temperature", 0.0, "a finite number of at least 0.001 and at most 1,000"),
    ],
)
def test_ranges_of_what_the_optimiser_and_the_teacher_read(key, value, sentence):
    config = digits.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=f"--config.{key} is {value} and must be {sentence}"):
        check_values(config)
