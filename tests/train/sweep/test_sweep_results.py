"""The comparison of a sweep's runs, by hand, and its file."""

import json
import statistics

import pytest

from cait_jax.explain.curves import sweep_plot
from cait_jax.train.sweep.results import append_row, read_rows, summary, text_of, varied_keys


def row(seed, rate, accuracy, best=None, seconds=3.0, **config):
    config = {"optimizer.learning_rate": rate, "seed": seed, **config}
    return {
        "name": f"{rate}{seed}", "digest": f"{config}", "config": config,
        "overrides": {"seed": str(seed), "optimizer.learning_rate": f"{rate:g}"},
        "metrics": {"eval/accuracy": accuracy, "eval/loss": 1.0}, "best": best or accuracy, "seconds": seconds,
    }  # fmt: skip


def test_seeds_are_averaged_and_the_best_is_first():
    rows = [row(0, 1e-3, 0.5, 0.6), row(1, 1e-3, 0.7, 0.8), row(0, 1e-4, 0.65, 0.7)]
    first, second = summary(rows)
    assert (first["optimizer.learning_rate"], first["seeds"], first["std"]) == ("0.0001", 1, None)
    assert second["mean"] == pytest.approx(0.6)
    assert second["std"] == pytest.approx(statistics.stdev([0.5, 0.7]))
    assert second["best"] == pytest.approx(0.7)
    assert "seed" not in second
    assert second["overrides"] == {"seed": "1", "optimizer.learning_rate": "0.001"}


def test_a_key_that_differs_between_commands_or_recipes_is_a_column():
    rows = [row(0, 1e-3, 0.5, steps=10), row(0, 1e-4, 0.6, steps=10), row(0, 1e-3, 0.7, steps=20)]
    assert varied_keys(rows) == ["steps", "optimizer.learning_rate"]
    assert [(each["steps"], each["seeds"]) for each in summary(rows)] == [
        ("20", 1),
        ("10", 1),
        ("10", 1),
    ]


def test_of_a_loss_the_least_is_best_and_what_has_none_is_last():
    rows = [
        {**row(0, rate, None), "best": loss, "metrics": {"eval/loss": loss} if loss else {}}
        for rate, loss in ((1.0, None), (2.0, 0.5), (3.0, 0.25))
    ]
    assert [each["optimizer.learning_rate"] for each in summary(rows)] == ["3", "2", "1"]


def test_a_seed_that_has_no_metric_does_not_hide_the_others():
    rows = [{**row(0, 1.0, None), "best": None, "metrics": {}}, row(1, 1.0, 0.5)]
    (only,) = summary(rows)
    assert (only["mean"], only["best"], only["seeds"]) == (0.5, 0.5, 2)


@pytest.mark.parametrize(
    ("value", "text"),
    [(1e-3, "0.001"), ([0.3, 1.0], "0.3,1"), (None, "None"), (True, "True"), ("mean", "mean")],
)
def test_values_are_written_as_a_command_line_has_them(value, text):
    assert text_of(value) == text


@pytest.mark.parametrize("line", [b"\0\0", b"[]", b'{"name": "a"}', b'{"name": "a", '])
def test_a_damaged_line_is_passed_over_and_the_next_is_whole(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    first, second = row(0, 1.0, 0.5), row(1, 1.0, 0.5)
    path.write_bytes(json.dumps(first).encode() + b"\n" + line)
    append_row(path, second)
    assert list(read_rows(path).values()) == [first, second]


def test_the_plot_has_a_dot_for_each_run_at_its_value():
    rows = [
        {"varied": {"learning_rate": rate}, "metrics": {"eval/accuracy": accuracy}}
        for rate, accuracy in (("1e-3", 0.5), ("1e-3", 0.7), ("1e-4", 0.65))
    ]
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
