"""`python train.py` as a user runs it: real processes, killed and started again."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from marks import slow
from run_files import WRITES_NO_CACHE, untimed

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train.metrics import read_metrics
from cait_jax.train.setup import build
from configs import digits

ROOT = Path(__file__).parents[2]
SMALL = {
    "steps": 60,
    "batch_size": 32,
    "model.width": 32,
    "model.depth": 2,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "optimizer.ema_decay": 0.9,
    "checkpoint.every_steps": 3,
    "eval.every_epochs": 0.5,
    "report.every_steps": 1,
}


def command(workdir):
    overrides = [f"--config.{key}={value}" for key, value in SMALL.items()]
    return [
        sys.executable,
        "train.py",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
        *overrides,
    ]


@pytest.fixture(scope="module")
def environment(compilation_cache):
    return os.environ | {"JAX_PLATFORMS": "cpu"} | compilation_cache


def last_state(workdir):
    config = digits.get_config()
    for key, value in SMALL.items():
        config.update_from_flattened_dict({key: value})
    template = build(config, jax.devices()[:1]).abstract_state
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        return checkpoints.restore(template)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_ends_with_the_same_bits(tmp_path, environment):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    result = subprocess.run(
        command(whole), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    # Nobody's terminal: lines, not a bar, and nothing of the libraries' own.
    assert all(line.startswith(("step", "cait_nano4")) for line in result.stderr.splitlines())
    assert "step 60/60" in result.stderr
    assert "images/s" in result.stderr
    assert "ETA" in result.stderr

    moments = random.Random(0)
    kills = 0
    metrics = killed / "metrics.jsonl"
    for target in (2, 20, 40):  # kill soon after the run has come this far
        process = subprocess.Popen(
            command(killed), cwd=ROOT, env=environment | WRITES_NO_CACHE,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None:
            rows = read_metrics(metrics)
            if rows and rows[-1]["step"] >= target:
                time.sleep(moments.uniform(0.0, 0.05))
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        kills += process.wait() == -signal.SIGKILL
    assert kills >= 2

    result = subprocess.run(
        command(killed), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert untimed(killed) == untimed(whole)
    step, state, meta = last_state(whole)
    step_again, state_again, meta_again = last_state(killed)
    assert step == step_again == 60
    assert meta == meta_again
    jax.tree.map(np.testing.assert_array_equal, state, state_again)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config=configs/digits.py", "--config.batchsize=3"], "nearest: batch_size"),
        (["--config=configs/cifar10.py", "--config.data.data_dir=/nowhere"], "tfds build cifar10"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_1(tmp_path, arguments, message):
    result = subprocess.run(
        [sys.executable, "train.py", f"--workdir={tmp_path / 'run'}", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_metrics_lines_are_json_with_an_integer_step(tmp_path, environment):
    """A stop by SIGTERM is a clean one: status 130, and what was computed is saved."""
    process = subprocess.Popen(
        command(tmp_path / "run"), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.poll() is None and len(read_metrics(metrics)) < 4:
        time.sleep(0.01)
    process.terminate()
    _, stderr = process.communicate()
    assert process.returncode == 130
    assert "the same command goes on from there" in stderr
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    assert all(type(row["step"]) is int for row in rows)
    assert last_state(tmp_path / "run")[0] == rows[-1]["step"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="no /proc")
def test_ctrl_c_while_libraries_are_imported_prints_nothing(tmp_path, environment):
    process = subprocess.Popen(
        command(tmp_path / "run"), cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    )
    while "jaxlib" not in Path(f"/proc/{process.pid}/maps").read_text():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


@pytest.mark.slow
def test_layer_scale_grows_under_lamb(tmp_path, environment):
    """From gammas of 1e-5, in 8 blocks. With a trust ratio for every array the accuracy is 0.200."""
    settings = {
        "model.depth": 8,
        "model.layer_scale_init": 1e-5,
        "optimizer.name": "lamb",
        "optimizer.learning_rate": 0.005,
        "optimizer.eps": 1e-6,
        "steps": 600,
        "eval.every_epochs": 100.0,
    }
    overrides = [f"--config.{key}={value}" for key, value in settings.items()]
    run = [sys.executable, "train.py", "--config=configs/digits.py", f"--workdir={tmp_path}"]
    subprocess.run([*run, *overrides], cwd=ROOT, env=environment, capture_output=True, check=True)
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["eval/accuracy"] >= 0.90


@pytest.mark.slow
def test_a_full_disk_is_a_sentence_at_each_save_and_the_run_goes_on_afterwards(
    tmp_path, environment
):
    """Files may not grow over 64 KiB, as on a disk without room: no checkpoint can be written."""
    workdir = tmp_path / "run"
    environment = environment | WRITES_NO_CACHE
    run = [*command(workdir), "--config.checkpoint.retry_seconds=2"]
    limited = f"ulimit -f 64; exec {shlex.join(run)}"
    result = subprocess.run(
        ["bash", "-c", limited],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    *before, last = result.stderr.splitlines()
    assert last.startswith(f"train.py: Saving step 60 under {workdir / 'checkpoints'} failed")
    assert "File too large" in last
    assert last.endswith("then run the same command again, which goes on from the last checkpoint")
    assert all(line.startswith(("step", "cait_nano4", "Saving step")) for line in before)
    assert "Saving step 3 under" in "\n".join(before)

    result = subprocess.run(
        command(workdir), cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "step 60/60" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "give a recipe by --config=FILE, such as --config=configs/digits.py"),
        (["--config=configs/digits.py", "--workdri=x"], "there is no flag --workdri; nearest: workdir"),
        slow(["--config=configs/digits.py", "config.seed=1"], "'config.seed=1' is no flag"),
        slow(["--config=configs/digits.py", "--processes=two"], "flag --processes=two: invalid literal"),
        slow(["--config=configs/digits.py", "--config.epochs=inf"], "--config.epochs is inf and must be"),
        slow(["--config=configs/digits.py", "--config.image_size=8,x"], "--config.image_size is 8,x and"),
        slow(["--config=configs/digits.py", "--config.model.num_heads=5"],
         "cait_nano4_patch4_8: --config.model.num_heads 5 does not divide width 64"),
        (["--config=configs/digits.py", "--workdir=/dev/null/run"], "nothing can be written in /dev/null/run"),
    ],
)  # fmt: skip
def test_a_command_line_that_is_wrong_is_one_sentence(arguments, sentence, environment):
    result = subprocess.run(
        [sys.executable, "train.py", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 1
    assert result.stderr.startswith(f"train.py: {sentence}")
    assert len(result.stderr.splitlines()) == 1
