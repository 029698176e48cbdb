"""Whole runs on real images: what they write, how they stop, how they go on."""

import dataclasses
import errno
import json
import os
import re
import shutil
import signal
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import tfds_files
from marks import slow
from run_files import untimed
from small_runs import nan_params, poison, small_digits
from trees import assert_same_bits

from cait_jax import UserError
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.data import sampler
from cait_jax.data.split import BrokenImage
from cait_jax.errors import StorageError
from cait_jax.files import DirectoryLock
from cait_jax.train import NonFiniteError, loop, train
from cait_jax.train.metrics import MetricWriter, read_metrics
from cait_jax.train.setup import Trainer
from configs import cait_xs24, cifar10


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One uninterrupted run, for comparison."""
    config = small_digits()
    config.steps = 6
    config.model.dropout = 0.1
    config.eval.batch_size = 100
    config.report.every_steps = 2
    workdir = tmp_path_factory.mktemp("finished")
    return config, workdir, train(config, workdir)


@pytest.fixture
def config(finished):
    return finished[0].copy_and_resolve_references()


def test_a_run_writes_its_metrics(finished):
    _, workdir, run = finished
    assert run.finished
    assert run.state.step == 6
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 4, 6, 6]
    for row in rows[:2] + rows[3:4]:
        assert {"train/loss", "train/accuracy", "train/learning_rate", "train/grad_norm"} < set(row)
    for row in (rows[2], rows[4]):
        assert 0 < row["eval/accuracy"] < 1
        assert row["eval/loss"] > 0
    assert all(type(row["step"]) is int for row in rows)
    assert run.metrics["eval/accuracy"] == rows[-1]["eval/accuracy"]


def test_a_finished_run_says_so_and_trains_no_more(finished, capsys):
    config, workdir, run = finished
    before = (workdir / "metrics.jsonl").read_bytes()
    again = train(config, workdir)
    assert_same_bits(again.state, run.state)
    assert again.metrics == run.metrics
    assert (workdir / "metrics.jsonl").read_bytes() == before
    said = capsys.readouterr().err
    assert re.search(r"is finished \(6 steps, .*\): to start anew, give another --workdir", said)


@pytest.mark.parametrize("number", [slow(signal.SIGTERM), signal.SIGINT])
def test_a_stopped_run_goes_on_to_the_same_bits(finished, config, tmp_path, monkeypatch, number):
    _, workdir, run = finished
    progress = MetricWriter.progress

    def stop_at_three(self, step, values):
        progress(self, step, values)
        if step == 3:
            signal.raise_signal(number)

    with monkeypatch.context() as patch:
        patch.setattr(MetricWriter, "progress", stop_at_three)
        stopped = train(config, tmp_path)
    assert not stopped.finished
    assert 3 <= stopped.state.step < 6
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "train/loss": 1.0}\n{"step": 5, "tra')
    resumed = train(config, tmp_path)
    assert resumed.finished
    assert_same_bits(resumed.state, run.state)
    assert untimed(tmp_path) == untimed(workdir)


def signalled(monkeypatch, number, step, after_step=True):
    """Has a signal come when the metrics of a step are read, or in its evaluation."""
    if after_step:
        progress = MetricWriter.progress

        def at_step(self, now, values):
            progress(self, now, values)
            if now == step:
                signal.raise_signal(number)

        monkeypatch.setattr(MetricWriter, "progress", at_step)
        return
    evaluate = loop._evaluate

    def in_evaluation(trainer, state, batches):
        if state.step == step:
            signal.raise_signal(number)
        return evaluate(trainer, state, batches)

    monkeypatch.setattr(loop, "_evaluate", in_evaluation)


@pytest.mark.slow
def test_slurms_warning_saves_and_the_run_goes_on(finished, config, tmp_path, monkeypatch):
    _, workdir, run = finished
    config.checkpoint.every_steps = 100
    config.checkpoint.keep = 10
    signalled(monkeypatch, signal.SIGUSR1, step=2)
    again = train(config, tmp_path)
    assert again.finished
    assert_same_bits(again.state, run.state)
    assert untimed(tmp_path) == untimed(workdir)
    assert checkpoint_steps(tmp_path) == [3, 4, 6]
    assert signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.slow
def test_a_signal_in_an_evaluation_stops_after_it(finished, config, tmp_path, monkeypatch):
    """The state is saved by then, so no further step is taken and saved."""
    _, workdir, run = finished
    with monkeypatch.context() as patch:
        signalled(patch, signal.SIGTERM, step=4, after_step=False)
        stopped = train(config, tmp_path)
    assert not stopped.finished
    assert stopped.state.step == 4
    assert checkpoint_steps(tmp_path) == [2, 4]
    assert_same_bits(train(config, tmp_path).state, run.state)
    assert untimed(tmp_path) == untimed(workdir)


def checkpoint_steps(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdecimal())


@pytest.mark.slow
def test_a_second_run_in_a_workdir_is_refused(finished, config, tmp_path):
    with (
        DirectoryLock(tmp_path),
        pytest.raises(UserError, match=r"is in use by process .* or give another --workdir"),
    ):
        train(config, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("lose", ["all", "some", "zeros"])
def test_lost_lines_are_said(finished, config, tmp_path, lose, capsys):
    _, workdir, run = finished
    copy = tmp_path / "run"
    shutil.copytree(workdir, copy)
    file = copy / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    if lose == "all":
        file.unlink()
    elif lose == "some":
        file.write_bytes(b"".join(lines[1:]))
    else:
        file.write_bytes(lines[0] + b"\0" * 30 + b"\n" + b"".join(lines[2:]))
    assert train(config, copy).metrics == run.metrics
    assert "has lost lines or they were changed since step 6 was saved" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("failing", [4, 6])
def test_a_state_is_saved_before_an_evaluation_that_fails(
    finished, config, tmp_path, monkeypatch, failing
):
    """As by a picture that cannot be decoded; the same command evaluates it and goes on to the same bits."""
    _, workdir, run = finished
    evaluate = loop._evaluate

    def fails(trainer, state, batches):
        if state.step == failing:
            batches.close()
            raise BrokenImage("image 7 (cut.jpg) cannot be decoded")
        return evaluate(trainer, state, batches)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_evaluate", fails)
        for _ in range(2):
            with pytest.raises(BrokenImage, match=r"cut\.jpg"):
                train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == failing
        assert checkpoints.metrics(failing) == {}
    # A kill after the evaluation's line was written and before it was recorded leaves the line.
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(f'{{"step": {failing}, "eval/loss": 1.0}}\n')
    resumed = train(config, tmp_path)
    assert resumed.finished
    assert resumed.metrics == run.metrics
    assert_same_bits(resumed.state, run.state)
    assert untimed(tmp_path) == untimed(workdir)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_the_evaluation_that_is_due(
    finished, config, tmp_path, monkeypatch
):
    _, workdir, run = finished
    stop_after(3, monkeypatch)  # read when step 4 is dispatched
    stopped = train(config, tmp_path)
    assert (int(stopped.state.step), stopped.metrics) == (4, {})
    monkeypatch.undo()
    resumed = train(config, tmp_path)
    assert_same_bits(resumed.state, run.state)
    assert untimed(tmp_path) == untimed(workdir)


def test_resuming_with_other_settings_is_refused(finished, config):
    _, workdir, _ = finished
    config.optimizer.learning_rate = 0.5
    config.model.depth = 2
    with pytest.raises(UserError) as caught:
        train(config, workdir)
    assert "model.depth was 1 and is now 2" in str(caught.value)
    assert re.search(r"optimizer.learning_rate was \S+ and is now 0.5", str(caught.value))
    assert "report" not in str(caught.value)


def test_a_large_set_goes_on_in_the_order_it_was_started_with(
    finished, config, tmp_path, monkeypatch
):
    _, before, _ = finished
    monkeypatch.setattr(sampler, "LISTED", 1000)
    with pytest.raises(UserError, match="by a version that shows the 1437 images of training in"):
        train(config, before)
    config.steps = 2
    train(config, tmp_path)
    assert Checkpoints(tmp_path / "checkpoints").meta()["data"]["train"]["order"] == "index_shuffle"
    assert train(config, tmp_path).finished


def test_reporting_and_worker_keys_may_differ(finished, config):
    _, workdir, run = finished
    config.report.every_steps = 1
    config.report.tensorboard = True
    config.data.workers = 3
    config.data.data_dir = "elsewhere"
    assert train(config, workdir).metrics == run.metrics


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    poison(monkeypatch, nan_params(2))
    config.checkpoint.every_steps = 1
    config.nonfinite.skips = config.nonfinite.rollbacks = 0
    with pytest.raises(NonFiniteError, match=r"step 2: loss .* from the weights saved here by"):
        train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 1
    assert all(row["step"] <= 2 for row in read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.slow
def test_nothing_is_saved_of_a_step_whose_loss_is_found_bad_in_its_evaluation(
    config, tmp_path, monkeypatch
):
    poison(monkeypatch, nan_params(2))
    config.eval.every_epochs = 32 / 1437  # every step
    config.nonfinite.skips = config.nonfinite.rollbacks = 0
    with pytest.raises(NonFiniteError, match=r"step 2: loss .* from the weights saved here by"):
        train(config, tmp_path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 1
    assert all(row["step"] <= 2 for row in read_metrics(tmp_path / "metrics.jsonl"))


@pytest.mark.slow
def test_training_goes_on_while_nothing_can_be_saved_and_ends_with_the_same_bits(
    finished, config, tmp_path, monkeypatch, capsys
):
    """The disk is mended while the last save waits to try again."""
    _, workdir, run = finished
    config.checkpoint.every_steps = 2
    fsync, failing = os.fsync, [True]

    def broken(descriptor):
        of = Path(f"/proc/self/fd/{descriptor}").readlink()
        if failing and "checkpoints" in of.parts:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return fsync(descriptor)

    waiting = types.SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: failing.clear())
    monkeypatch.setattr(os, "fsync", broken)
    monkeypatch.setattr(loop, "time", waiting)
    ended = train(config, tmp_path)
    said = capsys.readouterr().err
    for step, then in ((2, "training goes on without it"), (6, "trying again in 1 s")):
        failed = rf"Saving step {step} .* failed \(.*Input/output error.*mend the disk; {then}"
        assert re.search(failed, said)
    assert ended.finished
    assert_same_bits(ended.state, run.state)
    assert untimed(tmp_path) == untimed(workdir)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.latest_step() == 6
        assert checkpoints.metrics(6) == ended.metrics
    assert not [p for p in (tmp_path / "checkpoints").iterdir() if p.name not in ("6", "run.json")]


@pytest.mark.slow
def test_a_last_step_that_cannot_be_saved_is_an_error(config, tmp_path, monkeypatch):
    config.checkpoint.retry_seconds = 2.0
    monkeypatch.setattr(Checkpoints, "save", no_room)
    with pytest.raises(StorageError, match=r"no room, then run the same command again, which goes"):
        train(config, tmp_path)


def no_room(self, *arguments, **options):
    raise StorageError("no room")


@pytest.mark.slow
def test_metrics_of_a_step_are_read_when_the_devices_have_other_work(config, tmp_path, monkeypatch):
    """Before them the next step is dispatched, unless the step is saved."""
    order = []
    build, progress = loop.build, MetricWriter.progress

    def watched(*args, **kwargs):
        trainer = build(*args, **kwargs)

        def step(state, batch, objective):
            order.append("dispatch")
            return trainer.step(state, batch, objective)

        def evaluate(params, batches, progress=None):
            return trainer.evaluate(params, batches, lambda _: order.append("evaluate"))

        return dataclasses.replace(trainer, step=step, evaluate=evaluate)

    def read(self, step, values):
        order.append(f"read {step}")
        progress(self, step, values)

    monkeypatch.setattr(loop, "build", watched)
    monkeypatch.setattr(MetricWriter, "progress", read)
    config.checkpoint.every_steps = 3
    config.eval.batch_size = 200
    train(config, tmp_path)
    assert order == [
        "dispatch", "dispatch", "read 1", "dispatch", "read 2", "read 3",
        "dispatch", "read 4", "evaluate", "evaluate",
        "dispatch", "dispatch", "read 5", "read 6", "evaluate", "evaluate",
    ]  # fmt: skip


@pytest.mark.slow
def test_an_evaluation_loads_while_the_steps_before_it_run(config, tmp_path, monkeypatch):
    """And what a stopped run had begun to load is closed."""
    order, opened = [], []
    eval_batches, progress = Trainer.eval_batches, MetricWriter.progress

    def load(self):
        order.append("load")
        opened.append(eval_batches(self))
        return opened[-1]

    def read(self, step, values):
        order.append(step)
        progress(self, step, values)

    monkeypatch.setattr(Trainer, "eval_batches", load)
    monkeypatch.setattr(MetricWriter, "progress", read)
    monkeypatch.setattr(loop, "_PREFETCH_STEPS", 2)
    train(config, tmp_path / "whole")
    assert order == [1, "load", 2, 3, 4, "load", 5, 6]

    stop_after(2, monkeypatch)
    assert not train(config, tmp_path / "stopped").finished
    assert all(next(batches, None) is None for batches in opened)


@pytest.mark.slow
def test_an_evaluation_reads_its_batches_once_for_all_weights(config, tmp_path):
    """And says of each what an evaluation of it alone says."""
    config.optimizer.ema_decay = 0.5
    config.steps = 2
    run = train(config, tmp_path)
    trainer = loop.build(config)
    (alone,) = trainer.evaluate({"it": run.state.ema}, trainer.eval_batches()).values()
    assert run.metrics["eval/ema_loss"] == alone["loss"]
    assert run.metrics["eval/ema_accuracy"] == alone["accuracy"]


@pytest.mark.slow
def test_ema_is_kept_and_evaluated_beside_the_raw_weights(config, tmp_path):
    config.optimizer.ema_decay = 0.5
    run = train(config, tmp_path)
    assert {"eval/accuracy", "eval/ema_accuracy", "eval/ema_loss"} <= set(run.metrics)
    assert run.metrics["eval/ema_loss"] != run.metrics["eval/loss"]


@pytest.mark.slow
def test_imagenet_streams_and_resumes(tmp_path, monkeypatch):
    """The paper's recipe at a small size, on JPEGs of several sizes and modes."""
    splits = {}
    for number, split in enumerate(("train", "validation")):
        examples = [
            (tfds_files.numbered_jpeg(100 * number + i, 40 + 7 * i % 30, 50), i) for i in range(20)
        ]
        splits[split] = examples[: 20 if number == 0 else 11]
    tfds_files.write_imagenet2012(tmp_path, splits)
    config = cait_xs24.get_config()
    config.data.data_dir = str(tmp_path)
    config.batch_size = 8
    config.steps = 5
    config.image_size = 32
    config.eval.batch_size = 8
    config.model.depth = 2
    config.model.width = 48
    config.model.class_depth = 1
    config.report.every_steps = 1
    config.checkpoint.every_steps = 3
    config.eval.every_epochs = 100.0
    run = train(config, tmp_path / "whole")
    assert run.state.step == 5
    assert run.model.num_classes == 1000

    stop_after(3, monkeypatch)
    assert not train(config, tmp_path / "parts").finished
    monkeypatch.undo()
    assert_same_bits(train(config, tmp_path / "parts").state, run.state)
    assert untimed(tmp_path / "parts") == untimed(tmp_path / "whole")


def stop_after(step, monkeypatch):
    progress = MetricWriter.progress

    def stop(self, at, values):
        progress(self, at, values)
        if at == step:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(MetricWriter, "progress", stop)


@pytest.mark.slow
def test_cifar10_trains_in_memory(tmp_path):
    rng = np.random.default_rng(0)
    examples = [
        (tfds_files.encode(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)), i % 10)
        for i in range(48)
    ]
    tfds_files.write_cifar10(tmp_path, {"train": examples, "test": examples[:20]})
    config = cifar10.get_config()
    config.data.data_dir = str(tmp_path)
    config.batch_size = 16
    config.steps = 3
    config.model.depth = 1
    config.model.class_depth = 1
    config.model.width = 24
    config.model.num_heads = 2
    run = train(config, tmp_path / "run")
    assert run.finished
    assert run.model.image_size == (32, 32)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("batch_size", 2048, "2048 is larger than the 1437 examples of digits's split 'train'"),
        ("batch_size", 33, "batch_size 33 must be a multiple of 8"),
        ("data.name", "cifar10", "tfds build cifar10 --file_format=array_record"),
        ("data.name", "imagenet2012", "ILSVRC2012_img_train.tar"),
        ("data.eval_split", "validate", "no split 'validate'; nearest: validation"),
        (
            "model.name",
            "cait_nano",
            "--config.model.name is cait_nano and must be a known name; nearest: cait_",
        ),
        ("model.name", "regnety_160", "regnety_160 is here to teach and to predict"),
        (
            "model.class_token",
            "first",
            "model.class_token is first and must be one of class_attention",
        ),
        ("image_size", 16, "digits are 8 by 8"),
        ("model.dtype", "float23", "nearest: float32"),
        ("data.mean", (0.5, 0.5, 0.5), "data.mean has 3 values, and digits has 1 channel(s)"),
        (
            "report.every_steps",
            0,
            "--config.report.every_steps is 0 and must be a whole number of 1 or more",
        ),
        ("steps", 0, "--config.steps is 0 and must be a whole number of 1 or more"),
        (
            "eval.every_epochs",
            0.0,
            "--config.eval.every_epochs is 0.0 and must be a finite number above 0",
        ),
        (
            "loss.smoothing",
            1.0,
            "smoothing is 1.0 and must be a finite number in [0, 1)",
        ),
        (
            "eval.crop_pct",
            1.1,
            "--config.eval.crop_pct is 1.1 and must be a finite number in [0.001, 1]",
        ),
        ("augment.scale", (0.5, 0.1), "must be 2 increasing finite numbers in [0.001, 1]"),
        (
            "data.resize",
            "exat",
            "--config.data.resize is exat and must be one of exact, fast; nearest: exact",
        ),
        ("augment.simple_crop", True, "and those of digits are in memory"),
        (
            "data.workers",
            -1,
            "--config.data.workers is -1 and must be a whole number from 0 to 1,024",
        ),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_compiled(
    config, tmp_path, monkeypatch, key, value, message
):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    if key == "data.name":
        config.data.data_dir = str(tmp_path)
    *section, name = key.split(".")
    with config.unlocked():
        (config[section[0]] if section else config)[name] = value
    with monkeypatch.context() as patch:
        patch.setattr(jax.stages.Lowered, "compile", None)
        with pytest.raises(UserError, match=re.escape(message)) as caught:
            train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_address_is_no_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="--workdir=gs://bucket/run is an address"):
        train(cifar10.get_config(), "gs://bucket/run")
    assert not list(tmp_path.iterdir())
