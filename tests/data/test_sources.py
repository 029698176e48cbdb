import json
import os
import subprocess
import sys

import numpy as np
import pytest
from tfds_files import encode, noise, numbered_jpeg, write_cifar10, write_imagenet2012

from cait_jax.data import Encoded, InMemory, load_split, sources
from cait_jax.errors import UserError
from cait_jax.evaluation.labels import imagenet_classes

PICTURES = [noise(seed, 32, 32) for seed in range(9)]
TRAIN = [(encode(picture), seed % 10) for seed, picture in enumerate(PICTURES)]


@pytest.fixture
def data_dir(tmp_path):
    write_cifar10(tmp_path, {"train": TRAIN, "test": TRAIN[:3]}, shards=2)
    return tmp_path


def load_cifar10(data_dir, split="train", image_size=(32, 32)):
    return load_split("cifar10", split, image_size=image_size, data_dir=str(data_dir))


def message_of(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_images_of_the_size_asked_for_are_decoded_into_memory(data_dir):
    split = load_cifar10(data_dir)
    assert isinstance(split, InMemory)
    np.testing.assert_array_equal(split.images, PICTURES)
    np.testing.assert_array_equal(split.labels, range(9))
    assert split.labels.dtype == np.int32
    assert (len(split), split.num_classes, split.channels) == (9, 10, 3)
    assert split.class_names[:2] == ("airplane", "automobile")


def test_images_of_another_size_stay_encoded(data_dir):
    split = load_cifar10(data_dir, image_size=(64, 64))
    assert isinstance(split, Encoded)
    assert (len(split), split.num_classes, split.channels) == (9, 10, 3)
    assert [split.records[index]["image"] for index in range(9)] == [image for image, _ in TRAIN]
    assert split.records[4]["label"] == 4


def test_what_does_not_fit_in_memory_stays_encoded(data_dir, monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 9 * 32 * 32 * 3)
    assert isinstance(load_cifar10(data_dir), InMemory)
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 9 * 32 * 32 * 3 - 1)
    assert isinstance(load_cifar10(data_dir), Encoded)


def test_images_of_no_fixed_size_stay_encoded(tmp_path):
    write_imagenet2012(tmp_path, {"train": [(numbered_jpeg(0, 32, 32), 7)]})
    split = load_split("imagenet2012", "train", image_size=(32, 32), data_dir=str(tmp_path))
    assert isinstance(split, Encoded)
    assert split.num_classes == 1000


@pytest.mark.parametrize(
    ("part", "expected"),
    [("train[:4]", range(4)), ("train[50%:]", range(4, 9)), ("train[2:3]+train[7:]", (2, 7, 8))],
)
def test_parts_of_a_split(data_dir, part, expected):
    np.testing.assert_array_equal(load_cifar10(data_dir, part).labels, expected)


def test_the_default_folder_is_that_of_tfds(data_dir):
    # TFDS reads the variable when it is imported.
    code = (
        "from cait_jax.data import load_split; "
        "print(len(load_split('cifar10', 'test', image_size=(32, 32))))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"TFDS_DATA_DIR": str(data_dir)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout == "3\n"
    assert shown.stderr == ""


def test_unknown_split_names_the_splits(data_dir):
    message = message_of(load_cifar10, data_dir, "validation")
    assert "train (9 examples), test (3 examples)" in message


@pytest.mark.parametrize("split", ["train[", "train[:100]"])
def test_unreadable_part(data_dir, split):
    assert "a part is written like" in message_of(load_cifar10, data_dir, split)


def test_empty_part(data_dir):
    assert "is empty" in message_of(load_cifar10, data_dir, "train[3:3]")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("cifra10", "nearest: cifar10"),
        ("digit", "nearest: digits"),
        ("qqqqqq", "the known ones are at tensorflow.org/datasets/catalog"),
        ("cifar10:1.0.0", "check its name, configuration and version"),
        ("no such name", "check its name, configuration and version"),
    ],
)
def test_unknown_name(tmp_path, name, hint):
    load = load_split
    message = message_of(load, name, "train", image_size=(8, 8), data_dir=str(tmp_path))
    assert hint in message


def test_not_prepared(tmp_path):
    message = message_of(load_cifar10, tmp_path / "with space")
    assert "cifar10 is not prepared" in message
    folder = tmp_path / "with space"
    assert f"tfds build cifar10 --file_format=array_record '--data_dir={folder}'" in message
    assert f"run: cait data prepare cifar10 '--data-dir={folder}'" in message
    assert 'pip install "cait-jax[prepare]"' in message


def test_imagenet_not_prepared_says_where_its_archives_go(tmp_path):
    message = message_of(
        load_split, "imagenet2012", "train", image_size=(224, 224), data_dir=str(tmp_path)
    )
    manual = tmp_path / "downloads" / "manual"
    assert f"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {manual}" in message
    assert f"tfds build imagenet2012 --file_format=array_record --data_dir={tmp_path}" in message


def test_prepared_as_tfrecord_only(tmp_path):
    write_cifar10(tmp_path, {"train": TRAIN}, file_format="tfrecord")
    message = message_of(load_cifar10, tmp_path)
    assert "is prepared as tfrecord" in message
    assert f"run: cait data convert {tmp_path / 'cifar10' / '3.0.2'}" in message


def test_array_record_beside_tfrecord_is_found(data_dir):
    folder = data_dir / "cifar10" / "3.0.2"
    info = folder / "dataset_info.json"
    content = json.loads(info.read_text())
    content |= {"fileFormat": "tfrecord", "alternativeFileFormats": ["array_record"]}
    info.write_text(json.dumps(content))
    for path in list(folder.glob("*.array_record-*")):
        (folder / path.name.replace("array_record", "tfrecord")).touch()
    assert len(load_cifar10(data_dir)) == 9


@pytest.mark.parametrize("content", ["", "{", '{"splits": 3}'])
@pytest.mark.parametrize("file", ["features.json", "dataset_info.json"])
def test_damaged_descriptions(data_dir, file, content):
    (data_dir / "cifar10" / "3.0.2" / file).write_text(content)
    assert "copy or prepare it again" in message_of(load_cifar10, data_dir)


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "overwritten"])
def test_damaged_records(data_dir, damage):
    for shard in (data_dir / "cifar10" / "3.0.2").glob("*-train.array_record-*"):
        content = shard.read_bytes()
        match damage:
            case "missing":
                shard.unlink()
            case "empty":
                shard.write_bytes(b"")
            case "cut":
                shard.write_bytes(content[: len(content) // 2])
            case "overwritten":
                shard.write_bytes(content[:8000] + bytes(500) + content[8500:])
    message = message_of(load_cifar10, data_dir)
    assert "seems damaged" in message
    assert "copy or prepare it again" in message


def test_undecodable_image_in_memory(tmp_path):
    write_cifar10(tmp_path, {"train": [*TRAIN, (b"not an image", 0)]})
    message = message_of(load_cifar10, tmp_path)
    assert f"(image {len(TRAIN)} (" in message
    assert "cannot be decoded: not a JPEG, PNG or WebP image" in message


def test_split_without_labels(tmp_path):
    write_imagenet2012(tmp_path, {"test": [(numbered_jpeg(0, 32, 32), -1)]})
    message = message_of(
        load_split, "imagenet2012", "test", image_size=(32, 32), data_dir=str(tmp_path)
    )
    assert "no labels" in message


def test_digits():
    splits = {
        name: load_split("digits", name, image_size=(8, 8))
        for name in ("train", "test", "fit", "validation")
    }
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 1437,
        "test": 360,
        "fit": 1077,
        "validation": 360,
    }
    train = splits["train"]
    assert train.images.shape == (1437, 8, 8, 1)
    assert (train.images.min(), train.images.max()) == (0, 255)
    assert set(np.unique(train.images)) <= {round(level * 255 / 16) for level in range(17)}
    assert (train.num_classes, train.channels) == (10, 1)

    def rows(*names):
        return sorted(image.tobytes() for name in names for image in splits[name].images)

    assert rows("fit", "validation") == rows("train")
    assert not set(rows("train")) & set(rows("test"))
    for split in splits.values():  # stratified
        assert np.ptp(np.bincount(split.labels)) <= 0.1 * len(split) / 5


def test_digits_as_scikit_learn_divides_them():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    _, expected, _, expected_labels = train_test_split(
        images, labels, test_size=360, stratify=labels, random_state=0
    )
    test = load_split("digits", "test", image_size=(8, 8))
    np.testing.assert_array_equal(np.round(test.images.reshape(360, 64) / 255 * 16), expected)
    np.testing.assert_array_equal(test.labels, expected_labels)


def test_digits_refuse_another_size_or_split(monkeypatch):
    assert "must be 8" in message_of(load_split, "digits", "train", image_size=(32, 32))
    assert "nearest: train" in message_of(load_split, "digits", "tran", image_size=(8, 8))
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    message = message_of(load_split, "digits", "train", image_size=(8, 8))
    assert 'pip install "cait-jax[digits]"' in message


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, cait_jax.data; "
        "print({'PIL', 'cv2', 'grain', 'sklearn', 'tensorflow_datasets', 'tqdm'} & set(sys.modules))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "set()\n"


def test_real_cifar10(real_data_dir):
    split = load_split("cifar10", "test[:500]", image_size=(32, 32), data_dir=real_data_dir)
    assert isinstance(split, InMemory)
    assert split.images.shape == (500, 32, 32, 3)
    assert np.bincount(split.labels, minlength=10).min() > 20
    assert 110 < split.images.mean() < 130


def test_real_imagenet(real_data_dir):
    split = load_split("imagenet2012", "validation", image_size=(224, 224), data_dir=real_data_dir)
    assert isinstance(split, Encoded)
    assert split.num_classes == 1000
    assert split.class_names[0] == "n01440764"
    assert split.records[0]["image"][:2] == b"\xff\xd8"


def test_real_classes_are_in_the_order_of_their_ids(real_data_dir):
    split = load_split("imagenet2012", "validation", image_size=(224, 224), data_dir=real_data_dir)
    assert split.class_names == tuple(wnid for wnid, _ in imagenet_classes())
