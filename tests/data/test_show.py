import numpy as np
import pytest
from PIL import Image
from tfds_files import encode, noise, write_cifar10

from cait_jax.data import Encoded
from cait_jax.data.show import open_split, spread, summarize, write_sheet
from cait_jax.errors import UserError

COLOURS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


def folder_of(root, count, **sizes):
    for number in range(count):
        path = root / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((20 + number, 60, 3), COLOURS[number % 3], np.uint8)
        path.write_bytes(encode(pixels))
    return str(root)


def test_indices_are_spread_from_the_first_to_the_last():
    assert spread(3, 5) == [0, 1, 2]
    assert spread(100, 4) == [0, 33, 66, 99]
    assert spread(9, 1) == [0]


def test_a_folder_is_summed_up(tmp_path):
    name = folder_of(tmp_path, 9)
    (tmp_path / "a" / "broken.png").write_bytes(b"???")
    split = open_split(name, "all")
    found = summarize(name, "all", split, None)
    assert (found.images, found.broken, found.decoded) == (10, 1, 10)
    assert [name for name in found.broken_images if "a/broken.png" in name]
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    assert (found.width, found.height) == ((60, 60, 60), (20, 24, 28))


def test_a_tfds_data_set_is_summed_up_without_decoding_it_whole(tmp_path):
    examples = [(encode(noise(seed, 32, 32)), seed) for seed in range(4)]
    folder = write_cifar10(tmp_path, {"train": examples}, shards=2)
    data_dir = str(tmp_path)
    split = open_split("cifar10", "train", data_dir)
    assert isinstance(split, Encoded)
    found = summarize("cifar10", "train", split, data_dir)
    assert (found.images, found.broken, found.width) == (4, 0, (32, 32, 32))
    assert found.bytes == sum(path.stat().st_size for path in folder.glob("*array_record*"))
    part = open_split("cifar10", "train[:2]", data_dir)
    assert summarize("cifar10", "train[:2]", part, data_dir).bytes is None


def test_data_in_memory_is_summed_up():
    found = summarize("digits", "test", open_split("digits", "test"), None)
    assert (found.images, found.bytes, found.height) == (360, None, (8, 8, 8))


def test_the_sheet_shows_images_in_their_places(tmp_path):
    name = folder_of(tmp_path, 9)
    (tmp_path / "c" / "9.png").write_bytes(b"???")
    split = open_split(name, "all")
    words = ["a", "b", "a class whose name is longer than a picture is wide"]
    assert write_sheet(tmp_path / "sheet.png", split, words, images=99, columns=4) == [9]
    with Image.open(tmp_path / "sheet.png") as image:
        sheet = np.asarray(image)
    assert sheet.shape == (3 * 144, 4 * 128, 3)
    for place in range(9):
        middle = sheet[place // 4 * 144 + 64, place % 4 * 128 + 64]
        np.testing.assert_array_equal(middle, COLOURS[place // 3])
        assert sheet[place // 4 * 144 + 128 :, place % 4 * 128 :][:16, :128].min() < 128  # its name
    assert np.ptp(sheet[2 * 144 : 2 * 144 + 128, 128:256]) == 0  # grey


def test_the_sheet_of_data_in_memory(tmp_path):
    split = open_split("digits", "test")
    assert write_sheet(tmp_path / "s.png", split, [str(i) for i in range(10)], images=3) == []
    with Image.open(tmp_path / "s.png") as image:
        sheet = image.convert("L")
    tile = np.asarray(sheet.crop((128, 0, 256, 128)).reduce(16))
    index = spread(360, 3)[1]
    np.testing.assert_array_equal(tile, split.images[index, ..., 0])


def test_a_sheet_that_cannot_be_written(tmp_path):
    split = open_split(folder_of(tmp_path / "data", 3), "all")
    with pytest.raises(UserError, match="cannot be written: Is a directory"):
        write_sheet(tmp_path, split, ["a", "b", "c"], images=3)
