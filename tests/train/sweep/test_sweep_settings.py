"""Which runs a sweep is of: values and ranges, names, and what is refused before any run starts."""

from pathlib import Path

import pytest

from cait_jax.errors import UserError, config_flags, speaking
from cait_jax.train.sweep.settings import Range, grid, parse, resolve

DIGITS = "configs/digits.py"


def test_a_grid_has_every_combination_once():
    runs = grid(DIGITS, parse(
        {"optimizer.learning_rate": "1e-3,3e-4", "steps": "20", "augment.scale": "0.3,1;0.5,1", "seed": "0,1"}
    ))  # fmt: skip
    assert len({run.name for run in runs}) == len({run.digest for run in runs}) == len(runs) == 8
    assert runs[0].name == f"learning_rate=1e-3_scale=0.3,1_seed=0-{runs[0].digest[:8]}"
    assert runs[-1].overrides == {
        "optimizer.learning_rate": "3e-4", "steps": "20", "augment.scale": "0.5,1", "seed": "1",
    }  # fmt: skip
    assert runs[-1].config["augment.scale"] == [0.5, 1.0]


def test_names_tell_keys_and_long_values_apart(tmp_path):
    runs = grid(DIGITS, parse({"model.dropout": "0,0.1", "model.attention_dropout": "0,0.1"}))
    assert runs[1].name.startswith("dropout=0_attention_dropout=0.1-")
    long = f"digits,{tmp_path}/{'x' * 200}/a,{tmp_path}/{'x' * 200}/b"
    runs = grid(DIGITS, parse({"data.name": long}))
    assert len({run.name for run in runs}) == 3
    assert all(len(run.name) < 120 and "/" not in run.name for run in runs)


def test_a_run_is_known_by_what_changes_its_numbers(tmp_path):
    def digest(file=DIGITS, varied=(), **overrides):
        return resolve(str(file), {"seed": "0"} | overrides, list(varied)).digest

    assert digest() == digest(seed="0", **{"report.every_steps": "3", "data.workers": "2"})
    assert digest() == digest(**{"optimizer.learning_rate": str(1e-3)})  # as the recipe has it
    assert digest() != digest(steps="20")
    assert digest(varied=["data.workers"], **{"data.workers": "2"}) != digest()
    edited = tmp_path / "digits.py"
    text = Path(DIGITS).read_text()
    edited.write_text(text)
    assert digest(edited) == digest()
    edited.write_text(text.replace("batch_size=64", "batch_size=32"))
    assert digest(edited) != digest()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "20"}, "nothing varies"),
        ({}, "nothing varies"),
        ({"seed": "0,0"}, r"--config.seed has '0' twice"),
        ({"optimizer.learning_rate": "1e-3,0.001"}, "learning_rate: 1e-3 and 0.001 are the same run"),
        ({"sed": "0,1"}, "there is no config key 'sed'; nearest: seed"),
        ({"seed": "0,x"}, r"--config.seed is x and must be a whole number"),
        ({"batch_size": "64,"}, r"--config.batch_size is .* must be a whole number"),
        ({"augment.color_jitter": "0,0.3", "augment.rand_augment": "m9"}, "has no place beside"),
        ({"steps": "1..x"}, r"--config.steps=1..x is no range: give one such as 1..8 or 1..8:log"),
        ({"optimizer.learning_rate": "1e-4..1e-2:lin"}, r"give one such as 1e-4..1e-2 or 1e-4..1e-2:log"),
        ({"optimizer.learning_rate": "..1"}, "is no range"),
        ({"steps": "8..1"}, "--config.steps=8..1 ends where it begins or before"),
        ({"model.dropout": "0..0.5:log"}, "has no logarithm: begin above 0, or leave out :log"),
        ({"model.dropout": "nan..0.5"}, "give the lesser number first"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_any_run(settings, message):
    with speaking(config_flags), pytest.raises(UserError, match=message):
        grid(DIGITS, parse(settings))


def test_a_range_of_numbers():
    found = parse(
        {"optimizer.learning_rate": "1e-4..1e-2:log", "model.depth": "1..4", "data.name": "../a"}
    )
    assert found == {
        "optimizer.learning_rate": Range(1e-4, 1e-2, log=True, whole=False),
        "model.depth": Range(1, 4, log=False, whole=True),
        "data.name": ["../a"],
    }
    assert found["optimizer.learning_rate"].text(0.00123456) == "0.001235"
    assert found["model.depth"].text(3) == "3"
    # In four digits it would lie outside.
    assert float(Range(0.0, 0.123449, log=False, whole=False).text(0.123449)) <= 0.123449
