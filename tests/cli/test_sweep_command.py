"""`cait sweep` in real processes: what it leaves; stopped, killed and resumed; with a run that fails."""

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
    "--config=configs/digits.py", "--config.eval.every_epochs=99", "--config.model.depth=1",
    "--config.report.every_steps=1", "--config.batch_size=32",
]  # fmt: skip


def start(arguments, environment, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "cait_jax", "sweep", *TINY, *arguments],
        env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip


def rows_of(out):
    return [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]


def wait_for_step(process, out, step):
    deadline = time.monotonic() + 300
    while True:
        found = [path for path in out.glob("*/metrics.jsonl") if read_metrics(path)]
        if any(row["step"] >= step for path in found for row in read_metrics(path)):
            return found[0]
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_sweep_leaves_runs_table_and_plot_and_runs_nothing_twice(tmp_path, compilation_cache):
    arguments = [
        "--config.optimizer.learning_rate=1e-3,1e-30",
        "--config.seed=3,4",
        "--out",
        str(tmp_path),
        "--jobs=2",
    ]
    first = start([*arguments, "--config.steps=12"], compilation_cache)
    out, err = first.communicate(timeout=600)
    assert first.returncode == 0, err
    rows = rows_of(tmp_path)
    assert len(rows) == 4
    for row in rows:
        metrics = read_metrics(tmp_path / row["name"] / "metrics.jsonl")
        evaluated = [each for each in metrics if "eval/loss" in each]
        assert row["metrics"]["eval/accuracy"] == evaluated[-1]["eval/accuracy"]
    last = out.splitlines()[-1]
    flags = dict(re.findall(r"--config\.(\S+)=(\S+)", last))
    mean = {}
    for row in rows:
        rate = row["overrides"]["optimizer.learning_rate"]
        mean[rate] = mean.get(rate, 0) + row["metrics"]["eval/accuracy"] / 2
    assert mean[flags["optimizer.learning_rate"]] == max(mean.values())
    chosen = [row for row in rows if row["overrides"].items() <= flags.items()]
    assert len(chosen) == 1  # its seed is there too
    assert flags["steps"] == "12"
    assert (tmp_path / "table.md").read_text().count("\n") == 4
    assert (tmp_path / "table.csv").read_text().count("\n") == 3
    assert (tmp_path / "plot.png").stat().st_size > 1000

    again = start([*arguments, "--config.steps=12"], compilation_cache)
    out, _ = again.communicate(timeout=300)
    assert rows_of(tmp_path) == rows
    assert "4 runs in " in out
    assert ", 4 finished" in out

    # Another value of a key that does not vary is another run, in a workdir of its own, and a column of the table.
    other = start([*arguments, "--config.steps=13", "--config.seed=3,4"], compilation_cache)
    out, err = other.communicate(timeout=600)
    assert other.returncode == 0, err
    assert len(rows_of(tmp_path)) == 8
    table = (tmp_path / "table.csv").read_text().splitlines()
    assert table[0].split(",")[:2] == ["steps", "optimizer.learning_rate"]
    assert len(table) == 5


@pytest.mark.slow
def test_a_stopped_sweep_goes_on_and_a_failing_run_is_named(tmp_path, compilation_cache):
    # 100,000 images are more than there are, which is seen when the data are.
    arguments = ["--config.steps=300", "--config.batch_size=64,100000", "--out", str(tmp_path)]
    process = start(arguments, compilation_cache)
    metrics = wait_for_step(process, tmp_path, 3)
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
    assert "1 of 2 runs failed, such as batch_size=100000-" in last
    assert last.endswith("mend that, and the same command goes on")
    (row,) = rows_of(tmp_path)
    assert row["name"].startswith("batch_size=64-")
    steps = [r["step"] for r in read_metrics(metrics) if "train/loss" in r]
    assert steps == sorted(set(steps))
    log = tmp_path / f"{row['name']}.log"
    assert f"steps {reached + 1} to 300" in log.read_text()


@pytest.mark.slow
def test_a_killed_sweep_stops_its_runs_and_the_same_command_goes_on(tmp_path, compilation_cache):
    pytest.importorskip("optuna")
    arguments = [
        "--config.steps=200", "--trials=2", "--config.optimizer.learning_rate=1e-4..1e-2:log",
        "--out", str(tmp_path), "--config.checkpoint.every_steps=20",
    ]  # fmt: skip
    process = start(arguments, compilation_cache)
    metrics = wait_for_step(process, tmp_path, 3)
    process.kill()
    process.communicate(timeout=60)
    (asked,) = (tmp_path / "trials.jsonl").read_text().splitlines()

    process = start(arguments, compilation_cache)
    _, err = process.communicate(timeout=600)
    assert process.returncode == 0, err
    assert len(rows_of(tmp_path)) == 2
    assert (tmp_path / "trials.jsonl").read_text().splitlines()[0] == asked
    steps = [row["step"] for row in read_metrics(metrics) if "train/loss" in row]
    assert steps == list(range(1, 201))
    log = (tmp_path / f"{metrics.parent.name}.log").read_text()
    assert "is in use by" not in log
    assert len(re.findall(r"steps \d+ to 200", log)) == 2
