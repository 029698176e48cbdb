"""Trials drawn from ranges: reproducible, also after a stop, and better than chance."""

import math

import pytest

from cait_jax.errors import UserError
from cait_jax.train.sweep import search, settings
from cait_jax.train.sweep.search import Search
from cait_jax.train.sweep.settings import parse

pytest.importorskip("optuna")
DIGITS = "configs/digits.py"
VALUES = {
    "optimizer.learning_rate": "1e-5..1e-1:log",
    "model.depth": "1..4",
    "model.residual": "layerscale,plain",
    "steps": "20",
}


def finish(run, metric="eval/accuracy"):
    """The best rate is 1e-3 and LayerScale is better."""
    far = abs(math.log10(float(run.overrides["optimizer.learning_rate"])) + 3)
    value = 1 - far / 4 - 0.2 * (run.overrides["model.residual"] == "plain")
    value = value if metric == "eval/accuracy" else 1 - value
    return {
        "name": run.name, "overrides": run.overrides, "config": run.config, "digest": run.digest,
        "metrics": {metric: value}, "best": value, "seconds": 1.0,
    }  # fmt: skip


def draw(trials, rows, metric="eval/accuracy"):
    drawn = []
    while run := trials.next(rows):
        rows[run.digest] = finish(run, metric)
        drawn.append(run.overrides)
    return drawn


def test_a_stopped_search_draws_what_an_uninterrupted_one_does(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    whole = draw(Search(DIGITS, parse(VALUES), 14, tmp_path / "a"), {})
    assert len(whole) == 14
    rows = {}
    first = draw(Search(DIGITS, parse(VALUES), 12, tmp_path / "b"), rows)
    begun = Search(DIGITS, parse(VALUES), 14, tmp_path / "b").next(rows)  # and not finished
    again = Search(DIGITS, parse(VALUES), 14, tmp_path / "b")
    assert again.runs[-1] == begun
    assert [*first, *draw(again, rows)] == whole
    assert draw(Search(DIGITS, parse(VALUES), 14, tmp_path / "b"), rows) == []


@pytest.mark.parametrize("metric", ["eval/accuracy", "eval/loss"])
def test_later_trials_are_nearer_to_the_best(tmp_path, metric):
    drawn = draw(Search(DIGITS, parse(VALUES), 40, tmp_path), {}, metric)
    assert all(1e-5 <= float(each["optimizer.learning_rate"]) <= 1e-1 for each in drawn)
    assert {each["model.depth"] for each in drawn} == {"1", "2", "3", "4"}
    assert {each["steps"] for each in drawn} == {"20"}
    value = [finish_value(each) for each in drawn]
    assert sum(value[-10:]) / 10 > sum(value[:10]) / 10 + 0.1


def finish_value(overrides):
    far = abs(math.log10(float(overrides["optimizer.learning_rate"])) + 3)
    return 1 - far / 4 - 0.2 * (overrides["model.residual"] == "plain")


def test_trials_at_a_time_differ(tmp_path):
    trials = Search(DIGITS, parse({"model.residual": "layerscale,plain,rezero,fixup"}), 4, tmp_path)
    names = [run.name for run in iter(lambda: trials.next({}), None)]
    assert names
    assert len(set(names)) == len(names)  # a value that was drawn again is not trained again


def test_other_fixed_settings_are_another_search(tmp_path):
    rows = {}
    draw(Search(DIGITS, parse(VALUES), 3, tmp_path), rows)
    other = Search(DIGITS, parse(VALUES | {"steps": "30"}), 3, tmp_path)
    assert len(draw(other, rows)) == 3
    more = Search(DIGITS, parse(VALUES), 5, tmp_path)
    assert (len(more), len(more.runs)) == (5, 3)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "20"}, "nothing varies: give a range"),
        ({"seed": "0,1", "model.depth": "1..2"}, "--trials is of one seed"),
        ({"model.depth": "0..2"}, "model.depth"),
        ({"model.dropout": "0..1"}, "model.dropout"),
        ({"model.residual": "plain,nothing"}, "model.residual"),
    ],
)
def test_what_cannot_be_searched_is_refused(tmp_path, values, message):
    with pytest.raises(UserError, match=message):
        Search(DIGITS, parse(values), 3, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_recipe_is_resolved_once_for_all_ends_of_one_side(tmp_path, monkeypatch):
    """It may be slow to load."""
    asked = []

    def resolve(file, overrides, varied):
        asked.append(dict(overrides))
        return settings.resolve(file, overrides, varied)

    monkeypatch.setattr(search, "resolve", resolve)
    Search(DIGITS, parse(VALUES | {"model.residual": "layerscale,plain,rezero"}), 4, tmp_path)
    assert [each["model.residual"] for each in asked] == ["layerscale", "plain", "rezero"]
    assert [each["optimizer.learning_rate"] for each in asked[:2]] == ["1e-05", "0.1"]


def test_without_optuna_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "cait-jax\[sweep\]"'):
        Search(DIGITS, parse(VALUES), 3, tmp_path)
