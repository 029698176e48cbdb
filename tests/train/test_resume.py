"""What a checkpoint records of its data, and what a resumed run refuses."""

import errno
import json
import os

import numpy as np
import pytest
from PIL import Image

from cait_jax import UserError
from cait_jax.data.folder import load_folder
from cait_jax.data.split import InMemory, identity
from cait_jax.train.config import as_json, get_config
from cait_jax.train.metric_writer import MetricWriter
from cait_jax.train.resume import (
    MAX_LINE,
    check_resumable,
    check_resumed,
    check_same_data,
    metric_lines,
    read_metrics,
    rewind,
)
from configs import common


def pictures(root, *classes, count=2):
    for name in classes:
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")


def described(root):
    return {
        "train": identity(load_folder(root, "train")),
        "eval": identity(load_folder(root, "val")),
    }


@pytest.fixture
def root(tmp_path):
    pictures(tmp_path / "train", "apple", "pear")
    pictures(tmp_path / "val", "apple", "pear")
    return tmp_path


def test_the_same_data_go_on(root):
    saved = json.loads(json.dumps({"data": described(root)}))
    check_same_data(saved, described(root), "runs/a")
    check_same_data({}, described(root), "runs/a")  # of before anything was recorded


def rename_a_class(root):
    for split in ("train", "val"):
        (root / split / "apple").rename(root / split / "quince")


def add_a_class(root):
    pictures(root / "train", "fig")


def add_an_image(root):
    Image.new("RGB", (4, 4)).save(root / "train" / "pear" / "9.png")


def remove_an_image_of_evaluation(root):
    (root / "val" / "pear" / "1.png").unlink()


def move_an_image(root):
    (root / "train" / "pear" / "1.png").rename(root / "train" / "apple" / "2.png")


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (rename_a_class, "training data: class 0 was 'apple' and is 'pear' now"),
        (add_a_class, "training data: it had 2 classes and has 3 now, such as 'fig'"),
        (add_an_image, "training data: it had 4 images and has 5 now"),
        (remove_an_image_of_evaluation, "evaluation data: it had 4 images and has 3 now"),
        (move_an_image, "training data: its files have other names or are in other classes now"),
    ],
)
def test_changed_data_are_refused(root, change, difference):
    before = {"data": described(root)}
    change(root)
    with pytest.raises(UserError, match=f"the run in runs/a was started on other {difference};"):
        check_same_data(before, described(root), "runs/a")


def test_a_run_of_before_knows_its_class_names():
    def split(*names):
        return InMemory(np.zeros((3, 1, 1, 1), np.uint8), np.zeros(3, np.int32), names)

    now = {name: identity(split("a", "b")) for name in ("train", "eval")}
    check_same_data({"class_names": ["a", "b"]}, now, "runs/a")
    with pytest.raises(UserError, match="class 1 was 'c' and is 'b' now"):
        check_same_data({"class_names": ["a", "c"]}, now, "runs/a")


def config_of(root, batch_size=4):
    config = get_config()
    config.data.name, config.data.eval_split = str(root), "val"
    config.eval.batch_size = batch_size
    return config


def test_a_tuple_survives_the_checkpoint():
    config = common.get_config()
    check_resumable(as_json(config), config, "runs/x")


def test_changed_data_are_named_before_the_settings_that_follow_from_them(root):
    meta = {"config": as_json(config_of(root)), "data": described(root)}
    remove_an_image_of_evaluation(root)
    with pytest.raises(UserError, match="other evaluation data: it had 4 images and has 3 now"):
        check_resumed(meta, config_of(root, batch_size=3), described(root), "runs/a")


def test_a_folder_may_move_with_its_files_alone(root):
    meta = {"config": as_json(config_of(root)), "data": described(root)}
    moved = root.rename(root.with_name("moved"))
    check_resumed(meta, config_of(moved), described(moved), "runs/a")
    with pytest.raises(UserError, match=r"batch_size was 4 and is now 3: take them back"):
        check_resumed(meta, config_of(moved, batch_size=3), described(moved), "runs/a")
    add_an_image(moved)
    with pytest.raises(UserError, match=r"data\.name was '.*' and is now '.*moved'"):
        check_resumed(meta, config_of(moved), described(moved), "runs/a")


@pytest.mark.parametrize("tail", [b"", b'{"step": 4, "ti', b'{"step"', b"\0\0\0", b'{"step": 9}'])
def test_rewind_cuts_what_is_later_or_torn(tmp_path, tail):
    path = tmp_path / "metrics.jsonl"
    lines = [b'{"step": %d, "train/loss": 0.1}\n' % step for step in (1, 2, 3, 4)]
    path.write_bytes(b"".join(lines) + tail)
    rewind(path, 3)
    assert path.read_bytes() == b"".join(lines[:3])
    with MetricWriter(tmp_path, total_steps=9, start_step=3, images_per_step=1) as report:
        report.write(4, {"eval/loss": 1.0})
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_rewind_keeps_a_last_line_that_lacks_its_end_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}')
    rewind(path, 2)
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_a_rewind_that_is_stopped_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n')

    def stop(descriptor):
        raise OSError(errno.EIO, "stopped")

    monkeypatch.setattr(os, "fsync", stop)
    with pytest.raises(OSError, match="stopped"):
        rewind(path, 1)
    assert len(read_metrics(path)) == 2


def test_lines_of_any_length_are_passed_over_one_at_a_time(tmp_path):
    file = tmp_path / "metrics.jsonl"
    row = json.dumps({"step": 1, "train/loss": 0.5}).encode()
    long = json.dumps({"step": 2, "text": "x" * (2 * MAX_LINE)}).encode()
    file.write_bytes(row + b"\n" + long + b"\n" + b"\0" * MAX_LINE + b"\n" + row)
    assert [line for line, _ in metric_lines(file)] == [row, row]
    assert rewind(file, 1) == ""
    assert file.read_bytes() == row + b"\n" + row + b"\n"


def test_metrics_are_read_from_a_regular_file_alone(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match="named pipe"):
        read_metrics(tmp_path / "metrics.jsonl")
