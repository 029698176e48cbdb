"""The grid of a sweep: its runs, what is refused before any starts, and the summary, by hand."""

import json
import os
import statistics

import pytest

from cait_jax.errors import UserError, config_flags, speaking
from cait_jax.explain.curves import sweep_plot
from cait_jax.train import sweep
from cait_jax.train.sweep import SweepRun, grid, run_sweep, summary

DIGITS = "configs/digits.py"


def test_a_grid_has_every_combination_once():
    runs = grid(
        DIGITS,
        {"optimizer.learning_rate": "1e-3,3e-4", "steps": "20", "augment.scale": "0.3,1;0.5,1", "seed": "0,1"},
    )  # fmt: skip
    assert len({run.name for run in runs}) == len(runs) == 8
    assert runs[0].name == "learning_rate=1e-3_scale=0.3,1_seed=0"
    assert runs[0].varied == {
        "optimizer.learning_rate": "1e-3",
        "augment.scale": "0.3,1",
        "seed": "0",
    }
    assert all(run.fixed == {"steps": "20"} for run in runs)
    assert runs[-1].overrides == {
        "optimizer.learning_rate": "3e-4", "steps": "20", "augment.scale": "0.5,1", "seed": "1",
    }  # fmt: skip


def test_names_tell_keys_and_long_values_apart(tmp_path):
    runs = grid(DIGITS, {"model.dropout": "0,0.1", "model.attention_dropout": "0,0.1"})
    assert runs[1].name == "dropout=0_attention_dropout=0.1"
    runs = grid(DIGITS, {"data.name": f"digits,{tmp_path}/{'x' * 200}/a,{tmp_path}/{'x' * 200}/b"})
    assert len({run.name for run in runs}) == 3
    assert all(len(run.name) < 120 and "/" not in run.name for run in runs)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": "20"}, "nothing varies"),
        ({}, "nothing varies"),
        ({"seed": "0,0"}, r"--config.seed has '0' twice"),
        ({"sed": "0,1"}, "there is no config key 'sed'; nearest: seed"),
        ({"seed": "0,x"}, r"--config.seed is x and must be a whole number"),
        ({"batch_size": "64,"}, r"--config.batch_size is .* must be a whole number"),
    ],
)
def test_what_does_not_fit_is_refused_before_any_run(settings, message):
    with speaking(config_flags), pytest.raises(UserError, match=message):
        grid(DIGITS, settings)


def row(seed, rate, accuracy, best, seconds=3.0):
    return {
        "name": f"{rate}{seed}", "overrides": {}, "varied": {"learning_rate": rate, "seed": seed},
        "metrics": {"eval/accuracy": accuracy, "eval/loss": 1.0}, "best": best, "seconds": seconds,
    }  # fmt: skip


def test_seeds_are_averaged_and_the_best_is_first():
    rows = [row("0", "1e-3", 0.5, 0.6), row("1", "1e-3", 0.7, 0.8), row("0", "1e-4", 0.65, 0.7)]
    first, second = summary(rows)
    assert (first["learning_rate"], first["seeds"], first["std"]) == ("1e-4", 1, None)
    assert second["mean"] == pytest.approx(0.6)
    assert second["std"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert second["best"] == pytest.approx(0.7)
    assert "seed" not in second


def test_of_a_loss_the_least_is_best_and_what_has_none_is_last():
    rows = [
        {**row("0", rate, None, loss), "metrics": {"eval/loss": loss} if loss else {}}
        for rate, loss in (("1", None), ("2", 0.5), ("3", 0.25))
    ]
    assert [each["learning_rate"] for each in summary(rows)] == ["3", "2", "1"]


def test_runs_beside_each_other_share_cores_and_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    assert sweep._share(0, 1) == {}
    assert [sweep._share(place, 3)["CUDA_VISIBLE_DEVICES"] for place in range(3)] == ["4", "6", "4"]
    taken = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 2, 3, 7}, raising=False)
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, own: taken.append(own), raising=False)
    for place in range(3):
        monkeypatch.setenv("CAIT_SWEEP_PLACE", f"{place}/3")
        sweep._take_cores()
    assert taken == [[0, 7], [2], [3]]


@pytest.mark.parametrize("line", [b"\0\0", b"[]", b'{"name": "a"}', b'{"name": "a", '])
def test_a_damaged_line_is_a_run_that_is_looked_at_again(tmp_path, monkeypatch, line):
    good = {**row("0", "1", 0.5, 0.5), "name": "b", "overrides": {"seed": "0"}}
    (tmp_path / "runs.jsonl").write_bytes(line + b"\n" + json.dumps(good).encode() + b"\n")
    trained = []

    def train(file, run, *_):
        trained.append(run.name)
        return {**good, "name": run.name, "overrides": run.overrides}

    monkeypatch.setattr(sweep, "_train", train)
    runs = [SweepRun("a", {"seed": "1"}, {}), SweepRun("b", {"seed": "0"}, {})]
    assert len(run_sweep(DIGITS, runs, tmp_path)) == 2
    assert trained == ["a"]


def test_a_run_of_that_name_with_other_settings_is_trained(tmp_path, monkeypatch):
    trained = []

    def train(file, run, *_):
        trained.append(run.overrides)
        return {**row("0", "1", 0.5, 0.5), "name": run.name, "overrides": run.overrides}

    monkeypatch.setattr(sweep, "_train", train)
    for steps in ("10", "10", "20"):
        run_sweep(DIGITS, [SweepRun("a", {"seed": "0"}, {"steps": steps})], tmp_path)
    assert [each["steps"] for each in trained] == ["10", "20"]


def test_the_plot_has_a_dot_for_each_run_at_its_value():
    rows = [row("0", "1e-3", 0.5, 0.6), row("1", "1e-3", 0.7, 0.8), row("0", "1e-4", 0.65, 0.7)]
    figure = sweep_plot(rows, ["learning_rate"], "eval/accuracy")
    (axis,) = figure.axes
    dots = sorted((x, y) for line in axis.lines if line.get_marker() == "o"
                  for x, y in zip(*line.get_data(), strict=True))  # fmt: skip
    assert dots == [(1e-4, 0.65), (1e-3, 0.5), (1e-3, 0.7)]
    assert axis.get_xscale() == "log"
    words = [
        {**each, "varied": {"learning_rate": name}} for each, name in zip(rows, "abc", strict=True)
    ]
    (axis,) = sweep_plot(words, ["learning_rate"], "eval/accuracy").axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["a", "b", "c"]
