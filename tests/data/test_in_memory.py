import pickle

import numpy as np
import pytest

from cait_jax.data import Encoded, InMemory, in_memory, load_split, sources, train_batches
from cait_jax.data.decode import decode_image
from cait_jax.data.sources import split_names
from cait_jax.errors import UserError


def load(name, split="train", image_size=(16, 24)):
    return load_split(name, split, image_size=image_size)


def test_images_in_memory_have_the_size_asked_for_and_are_always_the_same():
    split = load("synthetic")
    assert isinstance(split, InMemory)
    assert split.images.shape == (4096, 16, 24, 3)
    assert (split.images.min(), split.images.max()) == (0, 255)
    assert len({image.tobytes() for image in split.images}) == 4096
    assert split.labels[:3].tolist() == [0, 1, 2]
    assert (split.labels.max(), split.num_classes) == (999, 1000)
    np.testing.assert_array_equal(split.images, load("synthetic").images)
    held_out = load("synthetic", "validation")
    assert held_out.images.shape == (1024, 16, 24, 3)
    assert not np.array_equal(held_out.images[0], split.images[0])


def test_of_large_images_there_are_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(sources, "IN_MEMORY_BYTES", 2**20)
    assert len(load("synthetic", image_size=(100, 100))) == 2**20 // 30_000
    with pytest.raises(UserError, match="2000 by 2000 pixels is too large"):
        load("synthetic", image_size=(2000, 2000))


def test_encoded_images_are_like_those_of_imagenet():
    split = load("synthetic/jpeg")
    assert isinstance(split, Encoded)
    assert len(split) == 1_281_167
    files = [split.records[index]["image"] for index in range(3)]
    assert [decode_image(file).shape for file in files] == [(400, 500, 3)] * 3
    assert 90_000 < np.mean([len(file) for file in files]) < 130_000
    assert len(set(files)) == 3
    last = split.records[len(split) - 1]
    assert last["label"] == 1_281_166 % 1000
    assert last["image"] == split.records[1_281_166 % 64]["image"]
    with pytest.raises(IndexError):
        split.records[len(split)]
    assert len(pickle.dumps(split.records)) < 500  # what goes to each worker


def test_batches_of_encoded_images():
    with train_batches(load("synthetic/jpeg"), seed=0, batch_size=2, image_size=(8, 8)) as batches:
        assert next(batches)["image"].shape == (2, 8, 8, 3)


def test_names_and_splits():
    for name in in_memory.NAMES:
        assert split_names(name) == ("train", "validation")
        with pytest.raises(UserError, match="no split 'trian'; nearest: train"):
            load(name, "trian")
    with pytest.raises(UserError, match="nearest: synthetic/jpeg"):
        load("synthetic/jpg")
