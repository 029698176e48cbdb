"""What a checkpoint records of its data, and what a resumed run refuses."""

import json

import numpy as np
import pytest
from PIL import Image

from cait_jax import UserError
from cait_jax.data.folder import load_folder
from cait_jax.data.sampler import recorded_order
from cait_jax.data.split import InMemory, identity
from cait_jax.train.config import as_json, get_config
from cait_jax.train.resume import check_resumable, check_resumed, check_same_data
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


def test_a_large_set_has_the_order_it_was_started_with():
    def described(order):
        split = {"class_names": ["a"], "examples": 5_000_000}
        return {"train": split | order, "eval": dict(split)}

    now = described(recorded_order(5_000_000, balanced=False))
    check_same_data({"data": now}, now, "runs/a")
    refused = (
        "in runs/a .* 5000000 images of training in another order: resume it with that version"
    )
    for meta in ({"data": described({})}, {"class_names": ["a"]}):
        with pytest.raises(UserError, match=refused):
            check_same_data(meta, now, "runs/a")
    lists = recorded_order(5_000_000, balanced=True), recorded_order(2**22, balanced=False)
    assert lists == ({}, {})
    check_same_data({"class_names": ["a"]}, described({}), "runs/a")


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
