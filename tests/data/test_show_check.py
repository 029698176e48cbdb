import os
import time

import numpy as np
import pytest
from odd_files import bmp
from tfds_files import encode, noise, numbered_jpeg

from cait_jax.data import show
from cait_jax.data.folder import load_folder
from cait_jax.data.loader import MAX_BROKEN
from cait_jax.data.show import check_images
from cait_jax.data.split import Encoded, InMemory
from cait_jax.errors import UserError

JPEG = numbered_jpeg(0, 40, 50)
CUT = JPEG[:-60]  # whose header is whole
NOTHING = b"<html>"


def folder(tmp_path, count, broken):
    """Images 0.jpg, 1.jpg, ... of one class, of which some have other bytes."""
    (tmp_path / "cat").mkdir()
    for number in range(count):
        (tmp_path / "cat" / f"{number:04}.jpg").write_bytes(broken.get(number, JPEG))
    return load_folder(tmp_path)


def test_whole_images_pass(tmp_path):
    seen = []
    split = folder(tmp_path, 150, {})
    assert check_images(split, progress=seen.append) == 0
    assert sum(seen) == 150
    assert (
        check_images(InMemory(np.zeros((3, 2, 2, 1), np.uint8), np.zeros(3, np.int32), ("a",))) == 0
    )


@pytest.mark.parametrize("data", [CUT, NOTHING, b""])
def test_one_broken_image_is_named_with_what_is_wrong(tmp_path, data):
    split = folder(tmp_path, 150, {77: data})
    with pytest.raises(UserError) as caught:
        check_images(split)
    message = str(caught.value)
    assert message.startswith(f"1 of 150 images cannot be read: {tmp_path / 'cat' / '0077.jpg'} (")
    assert message.endswith("); remove or replace it")
    assert "\n" not in message


def test_of_many_broken_images_four_are_named(tmp_path):
    split = folder(tmp_path, 90, dict.fromkeys(range(10, 80, 10), NOTHING))
    with pytest.raises(UserError) as caught:
        check_images(split)
    message = str(caught.value)
    assert message.startswith("7 of 90 images cannot be read: ")
    assert "0040.jpg and 3 more (the first: not a JPEG" in message
    assert "0050.jpg" not in message
    assert message.endswith("; remove or replace them")


def test_training_may_have_a_broken_image_in_a_hundred(tmp_path):
    split = folder(tmp_path, 200, {5: CUT, 150: NOTHING})
    assert check_images(split, may_be_broken=MAX_BROKEN) == 2
    (tmp_path / "cat" / "0099.jpg").write_bytes(NOTHING)
    with pytest.raises(UserError, match="3 of 200"):
        check_images(split, may_be_broken=MAX_BROKEN)


def test_where_decoding_takes_too_long_headers_are_read(tmp_path):
    # Image 0 is of the sample, which is decoded; 77 is not.
    split = folder(tmp_path, 150, {77: CUT})
    assert check_images(split, decode_all_within=0.0) == 0
    (tmp_path / "cat" / "0077.jpg").write_bytes(NOTHING)
    with pytest.raises(UserError, match=r"0077\.jpg \(not a JPEG"):
        check_images(split, decode_all_within=0.0)
    (tmp_path / "cat" / "0000.jpg").write_bytes(CUT)
    with pytest.raises(UserError, match=r"2 of 150.*0000\.jpg.*truncated"):
        check_images(split, decode_all_within=0.0)


def test_a_header_longer_than_what_is_read_of_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr(show, "_HEAD_BYTES", 400)
    split = folder(tmp_path, 150, {77: encode(noise(0, 9, 9), "JPEG", comment=b"x" * 1000)})
    assert check_images(split, decode_all_within=0.0) == 0


def test_a_file_that_is_gone_is_named(tmp_path):
    split = folder(tmp_path, 3, {})
    (tmp_path / "cat" / "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"1 of 3 images cannot be read: .*0001\.jpg \(image "):
        check_images(split)


@pytest.mark.parametrize("name", ["n01_1.JPEG", None])
def test_records_of_another_kind(name):
    records = [{"image": JPEG, "label": 0}, {"image": CUT, "label": 0}]
    if name:
        records[1]["file_name"] = name.encode()
    with pytest.raises(UserError) as caught:
        check_images(Encoded(records, ("a",), 3))
    which = "image 1 (n01_1.JPEG)" if name else "image 1"
    assert str(caught.value).startswith(f"1 of 2 images cannot be read: {which} (")


def test_a_thousand_headers_take_no_second(tmp_path):
    """Reading files whole would take a thousand times 4 MB."""
    large = bmp(np.zeros((1000, 1000, 4), np.uint8), header=40)
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "0.bmp").write_bytes(large)
    for number in range(1, 1000):
        os.link(tmp_path / "cat" / "0.bmp", tmp_path / "cat" / f"{number}.bmp")
    split = load_folder(tmp_path)
    start = time.process_time()
    assert check_images(split, decode_all_within=0.0) == 0
    sample_alone = time.process_time() - start
    assert sample_alone < 5
