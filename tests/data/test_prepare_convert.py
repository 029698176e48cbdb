import json
from pathlib import Path

import numpy as np
import pytest
from tfds_files import encode, framed, noise, write_cifar10

from cait_jax.data import load_split
from cait_jax.data import prepare as conversion
from cait_jax.data.prepare import convert, plan_conversion, read_tfrecord
from cait_jax.errors import UserError

BY_TENSORFLOW = Path(__file__).parents[1] / "fixtures" / "tensorflow.tfrecord"
PICTURES = [noise(seed, 32, 32) for seed in range(7)]
EXAMPLES = [(encode(picture), seed) for seed, picture in enumerate(PICTURES)]


@pytest.fixture
def folder(tmp_path):
    splits = {"train": EXAMPLES, "test": EXAMPLES[:2]}
    return write_cifar10(tmp_path, splits, shards=2, file_format="tfrecord")


def load(folder, split="train"):
    return load_split("cifar10", split, image_size=(32, 32), data_dir=str(folder.parents[1]))


def message_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_records_that_tensorflow_wrote_are_read():
    assert list(read_tfrecord(BY_TENSORFLOW)) == [b"", b"abc", bytes(range(256)) * 3]
    assert b"".join(map(framed, read_tfrecord(BY_TENSORFLOW))) == BY_TENSORFLOW.read_bytes()


def test_every_flipped_bit_and_every_cut_is_found(tmp_path):
    whole = framed(b"abc") + framed(b"")
    path = tmp_path / "x.tfrecord"
    for place in range(len(whole)):
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        message = message_of(list, read_tfrecord(path))
        assert f"record {int(place >= 19)} of {path}" in message
    for end in set(range(1, len(whole))) - {19}:
        path.write_bytes(whole[:end])
        assert "is cut short" in message_of(list, read_tfrecord(path))
    path.write_bytes(b"")
    assert list(read_tfrecord(path)) == []


def test_a_converted_data_set_is_read_by_index(folder):
    assert "run: cait data convert" in message_of(load, folder)
    done = []
    plan = plan_conversion(folder)
    assert (plan.records, len(plan.shards)) == (9, 4)
    assert convert(plan, done.append) == 4
    assert sum(done) == 9
    split = load(folder)
    np.testing.assert_array_equal(split.images, PICTURES)
    np.testing.assert_array_equal(split.labels, range(7))
    assert len(load(folder, "test")) == 2
    assert len(list(folder.glob("*.tfrecord-*"))) == 4  # as before
    assert not list(folder.glob(".*"))
    assert json.loads((folder / "dataset_info.json").read_text())["fileFormat"] == "tfrecord"


def test_a_conversion_that_was_stopped_goes_on_where_it_was(folder):
    class Stopped(Exception):
        pass

    def stop_after(count):
        seen = []

        def progress(records):
            seen.append(records)
            if len(seen) == count:
                raise Stopped

        return progress

    with pytest.raises(Stopped):
        convert(plan_conversion(folder), stop_after(5))
    assert len(list(folder.glob("*.array_record-*"))) == 1
    assert not list(folder.glob(".*"))
    assert "alternativeFileFormats" not in json.loads((folder / "dataset_info.json").read_text())
    (folder / "cifar10-train.tfrecord-00000-of-00002").unlink()  # to make room
    done = []
    assert convert(plan_conversion(folder), done.append) == 3
    assert sum(done) == 9
    np.testing.assert_array_equal(load(folder).images, PICTURES)
    assert convert(plan_conversion(folder)) == 0


def test_a_damaged_array_record_file_is_written_again(folder):
    convert(plan_conversion(folder))
    (folder / "cifar10-train.array_record-00001-of-00002").write_bytes(b"cut")
    assert convert(plan_conversion(folder)) == 1
    assert len(load(folder)) == 7
    formats = json.loads((folder / "dataset_info.json").read_text())["alternativeFileFormats"]
    assert formats == ["array_record"]


def test_damage_leaves_nothing_half_done(folder):
    shard = folder / "cifar10-test.tfrecord-00001-of-00002"
    whole = shard.read_bytes()
    for content, sentence in (
        (whole[:-1], f"record 0 of {shard} is cut short"),
        (b"junk" + whole, "the checksum of its length is wrong"),
        (whole * 2, f"{shard} holds 2 records and the data set says 1"),
        (b"", f"{shard} holds 0 records"),
    ):
        shard.write_bytes(content)
        assert sentence in message_of(convert, plan_conversion(folder))
        assert not (folder / "cifar10-test.array_record-00001-of-00002").exists()
        assert not list(folder.glob(".*"))
        assert "prepared as tfrecord" in message_of(load, folder)
    shard.unlink()
    assert "1 of the 4 files" in message_of(plan_conversion, folder)


def test_a_file_without_records(tmp_path):
    splits = {"test": EXAMPLES[:1]}
    folder = write_cifar10(tmp_path, splits, shards=2, file_format="tfrecord")
    assert convert(plan_conversion(folder)) == 2
    assert convert(plan_conversion(folder)) == 0
    np.testing.assert_array_equal(load(folder, "test").images, PICTURES[:1])


def test_a_full_disk_is_told_before(folder, monkeypatch):
    usage = conversion.shutil.disk_usage(folder)
    monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=10))
    assert "make room" in message_of(convert, plan_conversion(folder))
    assert not list(folder.glob("*.array_record-*"))


def test_the_folder_is_found_from_above(folder, tmp_path):
    assert plan_conversion(tmp_path).folder == folder
    assert "nearest: cifar10" in message_of(plan_conversion, tmp_path / "cifar01")
    (tmp_path / "empty").mkdir()
    assert "holds no TFDS data set" in message_of(plan_conversion, tmp_path / "empty")
    write_cifar10(tmp_path / "other", {"test": EXAMPLES[:1]})
    assert "holds several data sets" in message_of(plan_conversion, tmp_path)
    (folder / "features.json").write_text("{")
    assert "cannot be read" in message_of(plan_conversion, folder)
