import sys
import types

import pytest
import tensorflow_datasets as tfds
from tfds_files import encode, noise, write_cifar10

from cait_jax.data import prepare as preparation
from cait_jax.data.prepare import plan_preparation, prepare
from cait_jax.data.sources import load_split, split_names
from cait_jax.errors import UserError

EXAMPLES = [(encode(noise(0, 32, 32)), 1)]


def message_of(call, *arguments):
    with pytest.raises(UserError) as caught:
        call(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(scope="module", autouse=True)
def without_tensorflow(tmp_path_factory):
    """TFDS looks for TensorFlow once: here before a test pretends that it is there."""
    directory = tmp_path_factory.mktemp("tfds")
    write_cifar10(directory, {"train": EXAMPLES})
    assert plan_preparation("cifar10", str(directory)).prepared


@pytest.fixture
def tensorflow(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", types.ModuleType("tensorflow"))


@pytest.fixture
def downloads(monkeypatch):
    """What TFDS is asked to prepare, by a builder that then writes it or raises."""
    asked = []

    def download_and_prepare(self, **options):
        asked.append((self.name, options))
        if isinstance(asked[0], Exception):
            raise asked[0]
        write_cifar10(self.data_path.parents[1], {"train": EXAMPLES})

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", download_and_prepare)
    return asked


@pytest.mark.usefixtures("tensorflow")
def test_a_data_set_is_prepared_as_array_record(tmp_path, downloads):
    plan = plan_preparation("cifar10", str(tmp_path))
    assert (plan.folder, plan.prepared, plan.manual) == (tmp_path / "cifar10/3.0.2", False, None)
    assert plan.free_bytes > 0
    assert prepare("cifar10", str(tmp_path)) == plan.folder
    assert downloads == [("cifar10", {"file_format": "array_record"})]
    assert plan_preparation("cifar10", str(tmp_path)).prepared
    assert prepare("cifar10", str(tmp_path)) == plan.folder
    assert len(downloads) == 1  # nothing to do


@pytest.mark.usefixtures("tensorflow")
def test_what_tfds_cannot_do_is_one_sentence(tmp_path, downloads):
    downloads.append(OSError("no network\nand more"))
    assert (
        message_of(prepare, "cifar10", str(tmp_path))
        == "TFDS could not prepare cifar10: no network"
    )


def test_without_tensorflow_the_package_is_named(tmp_path, downloads, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    assert 'pip install "cait-jax[prepare]"' in message_of(prepare, "cifar10", str(tmp_path))
    assert not downloads


@pytest.mark.usefixtures("tensorflow")
def test_archives_are_put_in_their_place_first(tmp_path, downloads):
    manual = tmp_path / "downloads" / "manual"
    assert plan_preparation("imagenet2012", str(tmp_path)).manual == manual
    message = message_of(prepare, "imagenet2012", str(tmp_path))
    assert f"ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar into {manual}" in message
    assert not downloads


@pytest.mark.usefixtures("tensorflow")
def test_a_disk_that_is_too_small_is_told_before(tmp_path, downloads, monkeypatch):
    plan = plan_preparation("cifar10", str(tmp_path))
    small = preparation.Preparation(**vars(plan) | {"data_bytes": 10**9, "free_bytes": 10**8})
    monkeypatch.setattr(preparation, "plan_preparation", lambda *_: small)
    message = message_of(prepare, "cifar10", str(tmp_path))
    assert "takes 1.0 GB" in message
    assert "0.1 GB free" in message
    assert not downloads


def test_what_is_there_as_tfrecord_is_to_be_converted(tmp_path, downloads):
    write_cifar10(tmp_path, {"train": EXAMPLES}, file_format="tfrecord")
    assert "run: cait data convert" in message_of(prepare, "cifar10", str(tmp_path))
    assert "nearest: cifar10" in message_of(plan_preparation, "cifra10", str(tmp_path))
    assert not downloads


@pytest.mark.parametrize("address", ["gs://bucket/tfds", "s3://bucket/tfds", "hdfs://host/tfds"])
def test_an_address_is_refused_before_tfds_is_asked(address, monkeypatch):
    monkeypatch.setattr(tfds, "builder", None)  # not even called
    opened = {"image_size": (32, 32)}
    by_data_dir = message_of(lambda: load_split("cifar10", "train", data_dir=address, **opened))
    assert by_data_dir.startswith(f"{address} is an address")
    assert "gcsfuse" in by_data_dir
    assert message_of(lambda: split_names("cifar10", data_dir=address)) == by_data_dir
    assert message_of(plan_preparation, "cifar10", address) == by_data_dir
    assert message_of(lambda: load_split(address, "train", **opened)) == by_data_dir

    monkeypatch.setenv("TFDS_DATA_DIR", address)
    assert message_of(lambda: load_split("cifar10", "train", **opened)) == by_data_dir


def test_a_folder_given_goes_before_an_address_in_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", "gs://bucket/tfds")
    write_cifar10(tmp_path, {"train": EXAMPLES})
    assert plan_preparation("cifar10", str(tmp_path)).prepared
