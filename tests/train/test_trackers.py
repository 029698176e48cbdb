"""Trackers get each row once, over kills and resumes, and none of them can end a training."""

import itertools
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from cait_jax.errors import UserError
from cait_jax.train import trackers
from cait_jax.train.config import get_config
from cait_jax.train.metrics import MetricWriter, read_metrics

ROOT = Path(__file__).parents[2]


class Client:
    """A tracker that keeps what it gets."""

    def __init__(self, workdir, project, run_id, name, config):
        self.opened = (workdir, project, run_id, name, config)
        self.rows, self.pictures, self.closed = [], [], False
        self.made.append(self)

    def write(self, step, now, values):
        self.rows.append((step, dict(values)))

    def picture(self, step, name, picture):
        self.pictures.append((step, name, picture.shape))

    def close(self):
        self.closed = True


@pytest.fixture
def made(monkeypatch):
    """The clients that were opened as wandb's."""
    clients = []
    monkeypatch.setattr(Client, "made", clients, raising=False)
    monkeypatch.setattr(trackers, "_CLIENTS", {"wandb": Client})
    monkeypatch.setattr(trackers, "find_spec", lambda name: name)
    return clients


@pytest.fixture
def config():
    config = get_config()
    config.report.wandb = True
    return config


def rows_of(writer, steps, evaluated=()):
    for step in steps:
        writer.write(step, {"train/loss": 1 / step})
        if step in evaluated:
            writer.write(step, {"eval/loss": 2 / step})
            writer.picture(step, "eval/predictions", np.zeros((4, 5, 3), np.uint8))


def opened(config, workdir, start=0):
    workdir.mkdir(exist_ok=True)
    return MetricWriter(
        workdir, total_steps=100, start_step=start, images_per_step=1,
        trackers=trackers.from_config(config, workdir, start),
    )  # fmt: skip


def test_a_resumed_run_is_one_run_with_every_row_once(made, config, tmp_path):
    with opened(config, tmp_path / "run") as writer:
        rows_of(writer, range(1, 8), evaluated=(4,))
    with opened(config, tmp_path / "run", start=4) as writer:  # as after a kill
        rows_of(writer, range(4, 11), evaluated=(4, 8))
    first, second = made
    assert first.closed
    assert second.closed
    assert first.opened[2] == second.opened[2]
    rows = first.rows + second.rows
    steps = [step for step, values in rows if "train/loss" in values]
    assert steps == list(range(1, 11))
    assert [step for step, values in rows if "eval/loss" in values] == [4, 8]
    assert [values["train/loss"] for _, values in rows if "train/loss" in values][2] == 1 / 3
    assert first.pictures + second.pictures == [
        (step, "eval/predictions", (4, 5, 3)) for step in (4, 8)
    ]
    assert first.opened[1] == "cait_jax"
    assert first.opened[4]["model.name"] == "cait_xs24"


def test_rows_from_before_it_was_chosen_or_that_were_not_sent_are_sent_first(
    made, config, tmp_path
):
    config.report.wandb = False
    with opened(config, tmp_path) as writer:
        rows_of(writer, range(1, 4), evaluated=(2,))
    config.report.wandb = True
    with opened(config, tmp_path, start=3) as writer:
        writer.write(4, {"train/loss": float("nan")})
    (client,) = made
    assert [step for step, _ in client.rows] == [1, 2, 2, 3, 4]
    assert np.isnan(client.rows[-1][1]["train/loss"])
    with opened(config, tmp_path, start=4):
        pass
    assert len(made) == 1  # nothing was left to send


def test_an_evaluation_that_was_cut_off_is_sent(made, config, tmp_path):
    with opened(config, tmp_path) as writer:
        writer.write(4, {"train/loss": 0.5})
    with opened(config, tmp_path, start=4) as writer:
        writer.write(4, {"eval/loss": 0.25})
    assert made[1].rows == [(4, {"eval/loss": 0.25})]


@pytest.mark.parametrize("damage", [b"", b"[]", b'{"wandb": 3}', b'{"wandb": {"id": "x"}}', b"\0"])
def test_a_damaged_note_begins_a_new_run_there(made, config, tmp_path, damage):
    (tmp_path / "trackers.json").write_bytes(damage)
    with opened(config, tmp_path) as writer:
        rows_of(writer, [1])
    (client,) = made
    assert len(client.opened[2]) == 32
    assert client.rows == [(1, {"train/loss": 1.0})]
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"]["sent"] == [1, 0]


@pytest.mark.parametrize("where", ["__init__", "write", "close"])
def test_a_tracker_that_fails_is_said_once_and_left_out(
    made, config, tmp_path, monkeypatch, capsys, where
):
    def fail(*_):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(Client, where, fail)
    with opened(config, tmp_path) as writer:
        rows_of(writer, range(1, 5))
    message = capsys.readouterr().err
    assert message.count("wandb fails and is left out from here on (no route to host)") == 1
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_a_tracker_that_hangs_holds_up_nothing(made, config, tmp_path, monkeypatch, capsys):
    release = threading.Event()
    monkeypatch.setattr(Client, "write", lambda *_: release.wait(60))
    monkeypatch.setattr(trackers, "_PATIENCE_S", 0.2)
    start = time.monotonic()
    with opened(config, tmp_path) as writer:
        rows_of(writer, range(1, 5))
    assert time.monotonic() - start < 5
    assert "wandb has not taken everything within 0 s" in capsys.readouterr().err
    release.set()


def test_nothing_is_opened_where_nothing_is_written(made, config, tmp_path):
    with opened(config, tmp_path):
        pass
    assert made == []


@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name):
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    config = get_config()
    config.report[name] = True
    with pytest.raises(UserError, match=rf'report.{name}=True .*pip install "cait-jax\[{name}\]"'):
        trackers.from_config(config, tmp_path, 0)


def records(content):
    """Those of a LevelDB log with a header of 7 bytes: blocks of 32 KiB, records whole or in parts."""
    at, parts = 7, b""
    while at + 7 <= len(content):
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])  # after the checksum
        if kind == 0:  # the rest of a block
            at += -at % 2**15
            continue
        parts += content[at + 7 : at + 7 + length]
        at += 7 + length
        if -at % 2**15 < 7:
            at += -at % 2**15
        if kind in (1, 4):  # whole, or the last part
            yield parts
            parts = b""


def curve_of_wandb(folder):
    from wandb.proto import wandb_internal_pb2

    rows = []
    for file in sorted(folder.glob("run/wandb/offline-run-*/*.wandb")):
        for data in records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(data)
            row = {"/".join(item.nested_key) or item.key: json.loads(item.value_json)
                   for item in record.history.item}  # fmt: skip
            if "train/loss" in row:
                rows.append((row["_step"], row["train/loss"]))
    return rows


def curve_of_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params["model.name"] == "cait_nano4_patch4_8"
    return [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")]


def curve_of_trackio(folder):
    import sqlite3

    (file,) = (folder / "trackio").glob("mine*.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select run_name, step, metrics from metrics").fetchall()
    assert len({name for name, _, _ in rows}) == 1
    loaded = [(step, json.loads(metrics)) for _, step, metrics in rows]
    return [(step, row["train/loss"]) for step, row in loaded if "train/loss" in row]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["wandb", "mlflow", "trackio"])
def test_a_killed_and_resumed_training_is_one_curve(name, tmp_path, compilation_cache):
    pytest.importorskip(name, reason=f'{name} is not installed: pip install ".[{name}]"')
    command = [
        sys.executable, str(ROOT / "train.py"), f"--config={ROOT}/configs/digits.py",
        f"--workdir={tmp_path}/run", "--config.steps=120", "--config.checkpoint.every_steps=40",
        "--config.report.every_steps=5", "--config.eval.every_epochs=1",
        f"--config.report.{name}=True", "--config.report.project=mine",
    ]  # fmt: skip
    environment = os.environ | compilation_cache | {
        "WANDB_MODE": "offline", "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",
        "TRACKIO_DIR": f"{tmp_path}/trackio", "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    metrics = tmp_path / "run" / "metrics.jsonl"
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=log, stdout=log)
        deadline = time.monotonic() + 300
        while not any(row["step"] >= 60 for row in read_metrics(metrics)):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    subprocess.run(command, env=environment, cwd=tmp_path, check=True, capture_output=True)
    curve = {"wandb": curve_of_wandb, "mlflow": curve_of_mlflow, "trackio": curve_of_trackio}[name]
    found = curve(tmp_path)
    steps = [step for step, _ in found]
    assert sorted(set(steps)) == sorted(steps)
    written = {r["step"]: r["train/loss"] for r in read_metrics(metrics) if "train/loss" in r}
    assert set(steps) <= set(written)
    missing = [step for step in written if step not in steps]
    assert len(missing) <= (1 if name == "mlflow" else 12)  # the others store some rows at a time
    assert all(b - a == 5 for a, b in itertools.pairwise(missing))  # before the kill alone
    assert all(written[step] == pytest.approx(value, rel=1e-6) for step, value in found)
    assert all(a < b for a, b in itertools.pairwise(steps))
