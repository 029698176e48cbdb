import io
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_files import encode, noise, numbered_jpeg

from cait_jax.data.decode import (
    BrokenImage,
    center_crop,
    decode_image,
    random_resized_crop,
    sample_box,
)

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eval_crops.npz"
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def crop_with(seed, data, image_size=(24, 32), **options):
    return random_resized_crop(data, np.random.default_rng(seed), image_size=image_size, **options)


def test_center_crop_equals_the_evaluation_transform_of_timm():
    recorded = np.load(FIXTURE)
    images = [key for key in recorded if key.endswith("/jpeg")]
    assert len(images) == 2
    for key in images:
        for crop_ratio in (1.0, 0.875):
            expected = recorded[key.replace("jpeg", f"224@{crop_ratio}")]
            data = recorded[key].tobytes()
            crop = center_crop(data, image_size=(224, 224), crop_ratio=crop_ratio)
            np.testing.assert_array_equal(crop, expected)


@pytest.mark.parametrize("size", [(30, 90), (90, 30), (17, 17), (200, 101)])
def test_center_crop_of_another_shape_is_in_the_middle_and_covers(size):
    width = size[1]
    # A horizontal ramp: what is cut off at the left and at the right is the same.
    ramp = np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8)[None, :, None], (*size, 3))
    crop = center_crop(encode(np.ascontiguousarray(ramp)), image_size=(24, 40))
    assert crop.shape == (24, 40, 3)
    row = crop[12, :, 0].astype(int)
    assert np.all(np.diff(row) >= 0)
    assert abs(row[0] + row[-1] - 255) <= 3


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_formats(image_format):
    pixels = decode_image(numbered_jpeg(1, 40, 50))
    options = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"lossless": True}}[image_format]
    decoded = decode_image(encode(pixels, image_format, **options))
    assert decoded.shape == (40, 50, 3)
    assert np.abs(decoded.astype(int) - pixels).max() <= (24 if image_format == "JPEG" else 0)


def test_grayscale_fills_the_channels_asked_for():
    gray = encode(noise(0, 20, 30)[..., 0])
    assert np.all(np.ptp(decode_image(gray), axis=-1) == 0)
    np.testing.assert_array_equal(decode_image(gray, channels=1), decode_image(gray)[..., :1])
    for channels in (1, 3):
        assert crop_with(0, gray, channels=channels).shape == (24, 32, channels)
        assert center_crop(gray, image_size=(8, 8), channels=channels).shape == (8, 8, channels)


def test_cmyk_jpeg_becomes_rgb():
    red = np.full((32, 32, 3), (220, 30, 40), np.uint8)
    decoded = decode_image(encode(red, "JPEG", mode="CMYK"))
    assert decoded.shape == (32, 32, 3)
    assert np.abs(decoded.astype(int) - red).max() <= 4


def test_sixteen_bits_keep_the_high_ones():
    deep = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64
    np.testing.assert_array_equal(decode_image(encode(deep), channels=1)[..., 0], deep >> 8)


def test_palette_with_transparency():
    image = Image.fromarray(noise(0, 16, 16)).quantize(16)
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(16)))
    np.testing.assert_array_equal(decode_image(file.getvalue()), np.asarray(image.convert("RGB")))


def test_orientation_is_ignored():
    pixels = noise(0, 10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    np.testing.assert_array_equal(decode_image(encode(pixels, exif=exif)), pixels)


JPEG = numbered_jpeg(0, 60, 80)


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a" + bytes(40), JPEG[:30], JPEG[: len(JPEG) // 2], encode(noise(0, 9, 9))[:80]],
)
@pytest.mark.parametrize("decoder", [decode_image, "train", "eval"])
def test_broken_images(data, decoder):
    decode = {
        "train": lambda data: crop_with(0, data),
        "eval": lambda data: center_crop(data, image_size=(8, 8)),
    }.get(decoder, decoder)
    with pytest.raises(BrokenImage):
        decode(data)


def test_random_crop_is_a_function_of_its_generator():
    np.testing.assert_array_equal(crop_with(3, JPEG), crop_with(3, JPEG))
    assert crop_with(3, JPEG).shape == (24, 32, 3)
    assert not np.array_equal(crop_with(3, JPEG), crop_with(4, JPEG))


def test_random_crop_of_the_whole_image_is_a_resize():
    pixels = decode_image(JPEG)
    expected = Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC)
    crop = crop_with(0, JPEG, scale=(1.0, 1.0), ratio=(4 / 3, 4 / 3))
    np.testing.assert_array_equal(crop, np.asarray(expected))


def test_boxes_lie_inside_and_follow_scale_and_ratio():
    rng = np.random.default_rng(0)
    height, width = 300, 400
    boxes = np.array(
        [sample_box(rng, (height, width), scale=SCALE, ratio=RATIO) for _ in range(4000)]
    )
    top, left, box_height, box_width = boxes.T
    assert top.min() >= 0
    assert left.min() >= 0
    assert (top + box_height).max() <= height
    assert (left + box_width).max() <= width

    area = box_height * box_width / (height * width)
    ratio = box_width / box_height
    assert SCALE[0] - 0.01 < area.min() < 0.1
    assert 0.95 < area.max() <= 1
    assert RATIO[0] - 0.02 < ratio.min() < 0.78
    assert 1.3 < ratio.max() < RATIO[1] + 0.02
    # Boxes below half of the area always fit, so there the draw itself shows: uniform in area,
    # and uniform in the logarithm of the ratio.
    small = area < 0.5
    assert abs(area[small].mean() - (0.08 + 0.5) / 2) < 0.01
    assert abs(np.log(ratio[small]).mean()) < 0.015
    assert abs(np.log(ratio[small]).std() - math.log(16 / 9) / math.sqrt(12)) < 0.01
    # Where a box of this size can lie, it lies with equal chance.
    room = small & (box_height < height)
    assert abs((top[room] / (height - box_height[room])).mean() - 0.5) < 0.02


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((10, 1000), (0, 493, 10, 13)),
        ((1000, 10), (493, 0, 13, 10)),
        ((100, 100), (0, 0, 100, 100)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_without_a_fitting_draw_the_box_is_the_greatest_in_the_middle(size, expected):
    rng = np.random.default_rng(0)
    scale = (1.01, 1.02) if size != (1, 1) else (9.0, 9.0)
    assert sample_box(rng, size, scale=scale, ratio=RATIO) == expected


def test_shrinking_a_large_jpeg_while_decoding_hardly_shows(monkeypatch):
    data = numbered_jpeg(5, 700, 900)
    fast = [crop_with(seed, data, scale=(0.5, 1.0)) for seed in range(8)]
    monkeypatch.setattr("cait_jax.data.decode._jpeg_reduction", lambda *_: 1)
    full = [crop_with(seed, data, scale=(0.5, 1.0)) for seed in range(8)]
    difference = np.abs(np.array(fast).astype(int) - np.array(full))
    assert 0 < difference.mean() < 0.5
    assert difference.max() <= 4
