import functools
import pickle
import re

import numpy as np
import pytest
from tfds_files import numbered_jpeg

from cait_jax.data.decode import crop_from_config, random_resized_crop, simple_random_crop
from cait_jax.data.sampler import CROPPING, permutation, philox
from cait_jax.data.split import Encoded, InMemory
from cait_jax.errors import UserError
from cait_jax.train.config import get_config
from cait_jax.train.setup import build
from configs import digits

JPEGS = [{"image": numbered_jpeg(number, 60, 80), "label": number} for number in range(8)]
FILES = Encoded(JPEGS, tuple(map(str, range(8))), 3)


def config(**settings):
    config = get_config()
    config.augment.scale = (0.5, 0.6)
    for key, value in settings.items():
        section, name = key.split(".")
        config[section][name] = value
    return config


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, functools.partial(random_resized_crop, scale=(0.5, 0.6))),
        (
            {"data.resize": "fast"},
            functools.partial(random_resized_crop, scale=(0.5, 0.6), resize="fast"),
        ),
        ({"augment.simple_crop": True}, simple_random_crop),
        (
            {"augment.simple_crop": True, "data.resize": "fast"},
            functools.partial(simple_random_crop, resize="fast"),
        ),
    ],
)
def test_crops_by_config(settings, expected):
    crop = pickle.loads(pickle.dumps(crop_from_config(config(**settings), FILES)))
    found, wanted = (
        way(JPEGS[0]["image"], np.random.default_rng(1), image_size=(16, 16))
        for way in (crop, expected)
    )
    np.testing.assert_array_equal(found, wanted)


def test_a_run_crops_as_its_config_says(monkeypatch):
    monkeypatch.setattr("cait_jax.train.setup.load_split", lambda *_, **__: FILES)
    wanted = config(**{"augment.simple_crop": True, "data.aug_repeats": 1})
    wanted.batch_size, wanted.image_size = 8, 32
    wanted.model.name = "cait_xxs24"
    wanted.model.depth, wanted.model.width, wanted.model.num_heads = 1, 8, 1
    with build(wanted).train_batches() as batches:
        batch = next(batches)
    for row, example in enumerate(permutation(wanted.seed, 0, 8)):
        rng = np.random.Generator(philox(wanted.seed, row, CROPPING))
        crop = simple_random_crop(JPEGS[example]["image"], rng, image_size=(32, 32))
        np.testing.assert_array_equal(batch["image"][row], crop)


def test_images_in_memory_are_not_cropped_as_they_are_decoded():
    split = InMemory(np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), ("a",))
    message = "are in memory: set it to False and use --config.augment.pad_crop=4"
    with pytest.raises(UserError, match=message):
        crop_from_config(config(**{"augment.simple_crop": True}), split)


def test_an_unknown_way_to_resize_is_refused_with_the_nearest():
    message = "--config.data.resize is fsat and must be one of exact, fast; nearest: fast"
    with pytest.raises(UserError, match=re.escape(message)):
        build(config(**{"data.resize": "fsat"}))


def test_copies_that_share_a_draw_are_logged(caplog):
    config = digits.get_config()
    config.augment.mixup, config.data.aug_repeats = 0.8, 3
    config.augment.mix_rows = 32  # two groups of 64 rows
    build(config)
    assert "42 of the 64 rows of a batch share their mixup or CutMix draw" in caplog.text
    caplog.clear()
    config.augment.mix_rows = 20
    build(config)
    assert not caplog.records
