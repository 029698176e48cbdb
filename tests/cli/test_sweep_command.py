"""`cait sweep` in real processes: what it leaves, stopped and resumed, with a run that fails."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

from cait_jax.train.metrics import read_metrics

TINY = [
    "--config=configs/digits.py", "--config.steps=12", "--config.eval.every_epochs=9", "--config.model.depth=1",
    "--config.report.every_steps=1", "--config.batch_size=32",
]  # fmt: skip


def start(arguments, environment, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "cait_jax", "sweep", *TINY, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_sweep_leaves_runs_table_and_plot_and_runs_nothing_twice(tmp_path, compilation_cache):
    arguments = [
        "--config.optimizer.learning_rate=1e-3,1e-30,1e-4",
        "--out",
        str(tmp_path),
        "--jobs=2",
    ]
    first = start(arguments, compilation_cache)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 0, err
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    rows = {row["name"]: row for row in map(json.loads, lines)}
    assert set(rows) == {f"learning_rate={rate}" for rate in ("1e-3", "1e-30", "1e-4")}
    for name, row in rows.items():
        evaluated = [r for r in read_metrics(tmp_path / name / "metrics.jsonl") if "eval/loss" in r]
        assert row["metrics"]["eval/accuracy"] == evaluated[-1]["eval/accuracy"]
    accuracy = {row["varied"]["optimizer.learning_rate"]: row["best"] for row in rows.values()}
    best = re.search(r"--config.optimizer.learning_rate=(\S+)$", out)[1]
    assert accuracy[best] == max(accuracy.values())
    assert "--config.steps=12" in out.splitlines()[-1]
    assert (tmp_path / "table.md").read_text().count("\n") == 5
    assert (tmp_path / "table.csv").read_text().count("\n") == 4
    assert (tmp_path / "plot.png").stat().st_size > 1000

    again = start(arguments, compilation_cache)
    again.communicate(timeout=300)
    assert (tmp_path / "runs.jsonl").read_text().splitlines() == lines


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_a_failing_run_is_named(tmp_path, compilation_cache):
    # 100,000 images are more than there are, which is seen when the data are.
    arguments = ["--config.steps=300", "--config.batch_size=64,100000", "--out", str(tmp_path)]
    process = start(arguments, compilation_cache)
    metrics = tmp_path / "batch_size=64" / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while not any(row["step"] >= 3 for row in read_metrics(metrics)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert err.strip().endswith("stopped: the same command goes on")
    reached = read_metrics(metrics)[-1]["step"]
    assert 3 <= reached < 300
    assert not (tmp_path / "runs.jsonl").exists()

    process = start(arguments, compilation_cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 1
    last = err.strip().splitlines()[-1]
    assert "1 of 2 runs failed, such as batch_size=100000 (" in last
    assert last.endswith("mend that, and the same command goes on")
    (row,) = map(json.loads, (tmp_path / "runs.jsonl").read_text().splitlines())
    assert row["name"] == "batch_size=64"
    steps = [r["step"] for r in read_metrics(metrics) if "train/loss" in r]
    assert steps == sorted(set(steps))
    assert f"steps {reached + 1} to 300" in (tmp_path / "batch_size=64.log").read_text()
