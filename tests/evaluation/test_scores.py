"""From a model and a split to its scores, in one call."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from linear import MEAN, STD, Linear, linear_logits
from tfds_files import numbered_jpeg, write_imagenet2012, write_imagenet_real

from cait_jax import UserError
from cait_jax.data.decode import center_crop
from cait_jax.data.preprocess import Preprocessing
from cait_jax.data.sources import load_split
from cait_jax.data.split import BrokenImage, InMemory
from cait_jax.evaluation import Scores, score

COUNT, CLASSES = 41, 6
EIGHT = [f"n{i:08d}" for i in range(8)]
ON_JPEGS = Preprocessing((8, 8), 0.875, MEAN, STD)
IN_MEMORY = Preprocessing((4, 4), mean=MEAN, std=STD, channels=1)


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    split = InMemory(
        images=rng.integers(0, 256, (COUNT, 4, 4, 1), dtype=np.uint8),
        labels=rng.integers(0, CLASSES, COUNT, dtype=np.int32),
        class_names=tuple("abcdef"),
    )
    weights = (0.3 * rng.standard_normal((16, CLASSES))).astype(np.float32)
    return split, {"params": weights}, linear_logits(weights, split.images)


def untimed(scores):
    return dataclasses.replace(scores, seconds=0.0, loss=0.0, ece=0.0)


def test_scores_are_those_of_all_the_images_together(problem, capsys):
    split, variables, logits = problem
    found = score(Linear(), variables, split, IN_MEMORY, batch_size=1, class_names="abcdef")
    top5 = (np.argsort(-logits, axis=-1)[:, :5] == split.labels[:, None]).any(-1)
    assert (found.rule, found.images, found.counted) == ("all", COUNT, COUNT)
    assert (found.competing, found.classes, found.matched) == (CLASSES, CLASSES, "name")
    assert found.top1 == np.mean(logits.argmax(-1) == split.labels)
    assert found.top5 == np.mean(top5)
    assert found.class_names == list("abcdef")
    assert np.sum(found.confusion) == COUNT
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
    assert capsys.readouterr().err == ""

    for batch_size, devices in ((7, 3), (64, 1)):
        other = score(
            Linear(),
            variables,
            split,
            IN_MEMORY,
            batch_size=batch_size,
            by_position=True,
            devices=jax.devices()[:devices],
        )
        assert other.matched == "position"
        assert untimed(dataclasses.replace(other, matched="name")) == untimed(found)
        assert (other.loss, other.ece) == pytest.approx((found.loss, found.ece), rel=1e-5)


def jpegs(count):
    return [numbered_jpeg(i, 20, 30) for i in range(count)]


def logits_of_jpegs(images, weights):
    crops = [center_crop(image, image_size=(8, 8), crop_pct=0.875) for image in images]
    return linear_logits(weights, np.array(crops))


def weights_of(classes, seed=0):
    weights = np.random.default_rng(seed).standard_normal((192, classes))
    return weights.astype(np.float32)


def test_real_labels_from_the_data_set(tmp_path):
    rng = np.random.default_rng(0)
    images = jpegs(13)
    labels = [rng.choice(8, i % 4, replace=False).tolist() for i in range(13)]
    write_imagenet_real(
        tmp_path, [(image, 5, real) for image, real in zip(images, labels, strict=True)], 8
    )
    split = load_split("imagenet2012_real", "validation", image_size=(8, 8), data_dir=str(tmp_path))
    weights = weights_of(8)
    predicted = logits_of_jpegs(images, weights).argmax(-1)
    right = [p in real for p, real in zip(predicted, labels, strict=True)]
    assert sum(right) > 1

    found = score(Linear(), {"params": weights}, split, ON_JPEGS, batch_size=5, class_names=EIGHT)
    assert isinstance(found, Scores)
    assert (found.rule, found.images, found.counted) == ("real", 13, 9)
    assert found.top1 == sum(right) / 9
    assert (found.top5, found.confusion) == (None, None)

    found = score(Linear(), {"params": weights}, split, ON_JPEGS, rule="all", by_position=True)
    assert (found.counted, found.top1) == (13, np.mean(predicted == 5))


def test_the_restricted_rule_from_the_data_set(tmp_path):
    images = jpegs(12)
    labels = np.arange(12) % 3 * 400
    write_imagenet2012(tmp_path, {"test": list(zip(images, map(int, labels), strict=True))})
    split = load_split("imagenet2012", "test", image_size=(8, 8), data_dir=str(tmp_path))
    weights = weights_of(1000)
    logits = logits_of_jpegs(images, weights)[:, [0, 400, 800]]
    found = score(
        Linear(), {"params": weights}, split, ON_JPEGS, rule="restricted", by_position=True
    )
    assert found.class_names == ["n00000000", "n00000400", "n00000800"]
    assert found.top1 == np.mean(logits.argmax(-1) * 400 == labels) > 0
    assert (found.top5, found.competing, found.classes) == (None, 3, 1000)


def test_a_broken_image_is_named_and_ends_it(tmp_path):
    write_imagenet2012(tmp_path, {"test": [*((image, 0) for image in jpegs(3)), (b"?", 1)]})
    split = load_split("imagenet2012", "test", image_size=(8, 8), data_dir=str(tmp_path))
    with pytest.raises(BrokenImage, match=r"image 3 \(test_3\)"):
        score(Linear(), {"params": weights_of(1000)}, split, ON_JPEGS, by_position=True)


def test_encoded_images_get_the_channels_of_the_model(tmp_path):
    write_imagenet2012(tmp_path, {"test": [(image, 0) for image in jpegs(3)]})
    split = load_split("imagenet2012", "test", image_size=(8, 8), data_dir=str(tmp_path))
    gray = dataclasses.replace(ON_JPEGS, channels=1)
    found = score(
        Linear(), {"params": weights_of(1000)[:64]}, split, gray, rule="all", by_position=True
    )
    assert found.images == 3


def test_what_does_not_fit_is_said(problem):
    split, variables, _ = problem
    with pytest.raises(UserError, match=r"1 channel.* takes 3"):
        score(Linear(), variables, split, dataclasses.replace(IN_MEMORY, channels=3))
    few = dataclasses.replace(split, class_names=("a", "b"), labels=split.labels % 2)
    with pytest.raises(UserError, match="cannot be matched"):
        score(Linear(), variables, few, IN_MEMORY)
    found = score(Linear(), variables, few, IN_MEMORY, class_names=list("xaybzz"))
    assert (found.rule, found.class_names) == ("restricted", ["a", "b"])


def test_progress_is_shown_where_asked_for(problem, capsys, monkeypatch):
    monkeypatch.setattr("cait_jax.evaluation.scores.SECONDS_BETWEEN_LINES", 0.0)
    split, variables, _ = problem
    score(
        Linear(),
        variables,
        split,
        IN_MEMORY,
        batch_size=32,
        progress="digits\x1b",
        by_position=True,
    )
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" images, ")[0] for line in lines] == [
        "digits\\x1b: 32 of 41",
        "digits\\x1b: 41 of 41",
    ]
