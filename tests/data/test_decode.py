import hashlib
import io
import math
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tfds_files import encode, noise, numbered_jpeg

from cait_jax.data import decode
from cait_jax.data.decode import (
    center_crop,
    decode_image,
    random_resized_crop,
    sample_box,
    simple_random_crop,
)
from cait_jax.data.split import BrokenImage
from cait_jax.errors import UserError

FIXTURE = Path(__file__).parents[1] / "fixtures" / "eval_crops.npz"
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)


def crop_with(seed, data, image_size=(24, 32), **options):
    return random_resized_crop(data, np.random.default_rng(seed), image_size=image_size, **options)


def png(pixels, depth, colour, *chunks):
    """A PNG of any depth, which Pillow cannot write; colour 0 is L, 2 RGB, 4 LA and 6 RGBA."""
    rows = b"".join(b"\0" + row.astype(f">u{depth // 8}").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", pixels.shape[1], pixels.shape[0], depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def file_of(image, image_format="PNG", **options):
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


@pytest.mark.parametrize("preset", ["224@1.0", "224@0.875", "384@1.0"])
def test_center_crop_equals_the_evaluation_transform_of_timm(preset):
    recorded = np.load(FIXTURE)
    images = [key.removesuffix("/jpeg") for key in recorded if key.endswith("/jpeg")]
    assert len(images) == 6
    size, crop_pct = (float(part) for part in preset.split("@"))
    for image in images:
        data = recorded[f"{image}/jpeg"].tobytes()
        crop = center_crop(data, image_size=(int(size), int(size)), crop_pct=crop_pct)
        difference = np.abs(crop.astype(int) - recorded[f"{image}/{preset}"])
        decoded = hashlib.sha256(decode_image(data)).digest()
        if decoded == recorded[f"{image}/decoded_sha256"].tobytes():
            assert difference.max() == 0
        assert difference.max() <= 2  # another libjpeg rounds in its own way
        assert np.mean(difference <= 1) >= 0.999


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


@pytest.mark.parametrize(
    ("image_format", "options", "tolerance"),
    [
        ("PNG", {}, 0),
        ("JPEG", {"quality": 95}, 24),
        ("WEBP", {"lossless": True}, 0),
        ("BMP", {}, 0),
        ("TIFF", {}, 0),
        ("TIFF", {"compression": "tiff_lzw"}, 0),
    ],
)
def test_formats(image_format, options, tolerance):
    pixels = decode_image(numbered_jpeg(1, 40, 50))
    decoded = decode_image(encode(pixels, image_format, **options))
    assert decoded.shape == (40, 50, 3)
    assert np.abs(decoded.astype(int) - pixels).max() <= tolerance


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_counts(image_format):
    first, *others = (Image.new("RGB", (9, 7), colour) for colour in ("red", "blue", "lime"))
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = file_of(first, image_format, save_all=True, append_images=others, **options)
    np.testing.assert_array_equal(decode_image(data), np.full((7, 9, 3), (255, 0, 0)))


def test_a_picture_of_two_in_one_file_is_the_first():
    pixels = noise(0, 16, 16)
    both = {"save_all": True, "append_images": [Image.new("RGB", (16, 16))]}
    data = encode(pixels, "MPO", **both)
    np.testing.assert_array_equal(decode_image(data), decode_image(encode(pixels, "JPEG")))


def test_grayscale_fills_the_channels_asked_for():
    gray = encode(noise(0, 20, 30)[..., 0])
    assert np.all(np.ptp(decode_image(gray), axis=-1) == 0)
    np.testing.assert_array_equal(decode_image(gray, channels=1), decode_image(gray)[..., :1])
    for channels in (1, 3):
        assert crop_with(0, gray, channels=channels).shape == (24, 32, channels)
        assert center_crop(gray, image_size=(8, 8), channels=channels).shape == (8, 8, channels)


@pytest.mark.parametrize(("image_format", "inverted"), [("JPEG", True), ("TIFF", False)])
def test_cmyk_becomes_rgb(image_format, inverted):
    red = np.full((32, 32, 3), (220, 30, 40), np.uint8)
    data = encode(red, image_format, mode="CMYK")
    assert (b"Adobe" in data) == inverted  # Adobe's JPEG files hold 255 minus the ink
    decoded = decode_image(data)
    assert decoded.shape == (32, 32, 3)
    assert np.abs(decoded.astype(int) - red).max() <= 4


def test_one_bit():
    bits = noise(0, 12, 12)[..., 0] > 99
    for image_format in ("PNG", "TIFF", "BMP"):
        data = file_of(Image.fromarray(bits), image_format)
        np.testing.assert_array_equal(decode_image(data, channels=1)[..., 0], bits * 255)


DEEP = np.arange(32 * 32, dtype=np.uint16).reshape(32, 32) * 64


@pytest.mark.parametrize(
    "data",
    [
        encode(DEEP),
        encode(DEEP, "TIFF"),
        encode(DEEP.astype(">u2"), "TIFF"),
        encode(DEEP.astype(np.int32), "TIFF"),
    ],
    ids=["png", "tiff", "big-endian tiff", "32-bit tiff"],
)
def test_sixteen_bits_are_scaled(data):
    levels = decode_image(data, channels=1)[..., 0]
    assert np.abs(levels - DEEP / 257).max() < 1
    assert np.all(np.ptp(decode_image(data), axis=-1) == 0)


@pytest.mark.parametrize("mode", ["I", "I;16", "I;16B", "I;16L"])
def test_sixteen_bits_opened_by_pillow_are_scaled(mode):
    dtype = {"I": np.int32, "I;16B": ">u2"}.get(mode, "<u2")
    image = Image.frombytes(mode, (32, 32), DEEP.astype(dtype).tobytes())
    crop = center_crop(image, image_size=(32, 32), channels=1)
    assert np.abs(crop[..., 0] - DEEP / 257).max() < 1


@pytest.mark.parametrize("colour", [2, 4, 6])
def test_sixteen_bits_in_colour(colour):
    pixels = np.random.default_rng(0).integers(0, 65536, (8, 8, {2: 3, 4: 2, 6: 4}[colour]))
    if colour == 2:
        expected = pixels / 257
    else:
        alpha = pixels[..., -1:] / 65535
        expected = pixels[..., :-1] / 257 * alpha + 255 * (1 - alpha)
    assert np.abs(decode_image(png(pixels, 16, colour)) - expected).max() < 3


@pytest.mark.parametrize("white", [255, 65535, 2**30])
def test_integers_of_thirty_two_bits_keep_their_range(white):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    data = encode(np.round(ramp * white).astype(np.int32), "TIFF")
    np.testing.assert_allclose(decode_image(data, channels=1)[..., 0], ramp * 255, atol=0.51)


@pytest.mark.parametrize("white", [1, 255, 65535, 1e6])
def test_floats_keep_their_range(white):
    ramp = np.linspace(0, 1, 256).reshape(16, 16)
    data = encode((ramp * white).astype(np.float32), "TIFF")
    np.testing.assert_allclose(decode_image(data, channels=1)[..., 0], ramp * 255, atol=0.51)


def test_floats_outside_any_range():
    levels = np.array([[np.nan, -np.inf, -3, 0.5, 1, np.inf]], np.float32)
    decoded = decode_image(encode(levels, "TIFF"), channels=1)
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 0, 128, 255, 255])
    nothing = encode(np.full((2, 2), np.nan, np.float32), "TIFF")
    np.testing.assert_array_equal(decode_image(nothing), np.zeros((2, 2, 3)))


def over_white(colours, alpha):
    return colours * (alpha / 255) + 255 * (1 - alpha / 255)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_what_is_transparent_lies_over_white(image_format, mode):
    pixels = noise(0, 16, 16, 4)[..., -len(mode) :]
    pixels[0, 0, -1], pixels[0, 1, -1] = 0, 255
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    decoded = decode_image(file_of(Image.fromarray(pixels), image_format, **options))
    np.testing.assert_allclose(
        decoded, over_white(pixels[..., :-1], pixels[..., -1:]) + np.zeros(3), atol=1
    )
    assert np.all(decoded[0, 0] == 255)
    assert np.all(decoded[0, 1] == pixels[0, 1, :-1])


@pytest.mark.parametrize("mode", ["RGBa", "La", "PA"])
def test_other_modes_with_alpha_lie_over_white(mode):
    image = Image.new({"RGBa": "RGB", "La": "L", "PA": "P"}[mode], (8, 8))
    if mode == "PA":
        image.putpalette([60, 60, 60])
    else:
        image.paste((60, 60, 60) if mode == "RGBa" else 60, (0, 0, 8, 8))
    image.putalpha(128)
    image = image.convert(mode)
    assert image.mode == mode
    crop = center_crop(image, image_size=(8, 8))
    np.testing.assert_allclose(crop, np.full((8, 8, 3), over_white(60, 128)), atol=2)


def test_palette():
    image = Image.fromarray(noise(0, 16, 16)).quantize(16)
    colours = np.asarray(image.convert("RGB"))
    alpha = np.arange(16)[..., None] * 17
    for image_format in ("PNG", "GIF", "BMP", "TIFF"):
        np.testing.assert_array_equal(decode_image(file_of(image, image_format)), colours)

    decoded = decode_image(file_of(image, transparency=bytes(alpha[:, 0].tolist())))
    indices = np.asarray(image)
    np.testing.assert_allclose(decoded, over_white(colours, alpha[indices]), atol=1)

    decoded = decode_image(file_of(image, "GIF", transparency=3))
    hidden = np.all(colours == colours[indices == 3][0], axis=-1)
    np.testing.assert_array_equal(decoded, np.where(hidden[..., None], 255, colours))


def test_a_transparent_colour_becomes_white():
    pixels = noise(0, 8, 8)
    key = tuple(int(level) for level in pixels[2, 3])
    expected = pixels.copy()
    expected[np.all(pixels == key, axis=-1)] = 255
    decoded = decode_image(file_of(Image.fromarray(pixels), transparency=key))
    np.testing.assert_array_equal(decoded, expected)


# What a camera stores, from what was seen, by the value of the EXIF tag 0x0112.
STORED = {
    1: lambda seen: seen,
    2: np.fliplr,
    3: lambda seen: np.rot90(seen, 2),
    4: np.flipud,
    5: lambda seen: np.swapaxes(seen, 0, 1),
    6: np.rot90,
    7: lambda seen: np.swapaxes(np.rot90(seen, 2), 0, 1),
    8: lambda seen: np.rot90(seen, -1),
}


def turned(seen, orientation, image_format="PNG", **options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = np.ascontiguousarray(STORED[orientation](seen))
    return encode(stored, image_format, exif=exif, **options)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("image_format", ["PNG", "WEBP", "TIFF"])
def test_orientation_is_followed_where_asked_for(orientation, image_format):
    seen = noise(0, 10, 20) // 4 + 96
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = turned(seen, orientation, image_format, **options)
    np.testing.assert_array_equal(center_crop(data, image_size=(10, 20), exif=True), seen)
    # Columns are resized before rows, and rounded in between.
    difference = crop_with(1, data, exif=True).astype(int) - crop_with(1, encode(seen))
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("orientation", STORED)
def test_orientation_of_a_jpeg_that_shrinks_while_decoding(orientation):
    seen = decode_image(numbered_jpeg(5, 500, 700))
    options = {"scale": (0.8, 1.0), "exif": True, "resize": "fast"}
    fast = crop_with(0, turned(seen, orientation, "JPEG", quality=95), **options)
    difference = np.abs(fast.astype(int) - crop_with(0, encode(seen), **options))
    assert difference.mean() < 1
    assert difference.max() <= 10


def test_orientation_is_ignored_in_data_sets():
    pixels = noise(0, 10, 20)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(pixels, exif=exif)
    np.testing.assert_array_equal(decode_image(data), pixels)
    np.testing.assert_array_equal(center_crop(data, image_size=(10, 20)), pixels)
    rng = np.random.default_rng(0)
    whole = {"image_size": (10, 20), "scale": (1.0, 1.0), "ratio": (2.0, 2.0)}
    np.testing.assert_array_equal(random_resized_crop(data, rng, **whole), pixels)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = noise(0, 10, 20)
    crop = center_crop(encode(pixels, exif=exif), image_size=(10, 20), exif=True)
    np.testing.assert_array_equal(crop, pixels)


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\1"]
)
def test_broken_exif_spoils_no_picture(exif):
    pixels = noise(0, 10, 20)
    crop = center_crop(encode(pixels, exif=exif), image_size=(10, 20), exif=True)
    np.testing.assert_array_equal(crop, pixels)


def huge(width, height, image_format):
    """A small file whose header promises `width` by `height` pixels."""
    data = bytearray(encode(noise(0, 8, 8), image_format))
    match image_format:
        case "PNG":
            return png(np.zeros((0, width, 3)), 8, 2).replace(
                struct.pack(">II", width, 0), struct.pack(">II", width, height), 1
            )
        case "JPEG":
            place, dimensions = data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width)
        case "GIF":
            place, dimensions = 6, struct.pack("<HH", width, height)
        case "BMP":
            place, dimensions = 18, struct.pack("<ii", width, height)
    data[place : place + len(dimensions)] = dimensions
    return bytes(data)


@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "GIF", "BMP"])
@pytest.mark.parametrize("side", [9460, 30000])
def test_too_many_pixels_are_refused_unread_without_a_warning(image_format, side, monkeypatch):
    data = huge(side, side, image_format)
    if image_format == "PNG":  # the sum of the header
        chunk = data[12:29]
        data = data[:29] + struct.pack(">I", zlib.crc32(chunk)) + data[33:]
    monkeypatch.setattr(Image.Image, "load", None)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        with pytest.raises(BrokenImage) as caught:
            center_crop(data, image_size=(8, 8))
    assert f"{side:,} by {side:,} pixels" in str(caught.value)
    assert "89,478,485" in str(caught.value)
    assert not warned


def test_the_limit_itself_is_allowed(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 200)
    image = Image.fromarray(noise(0, 10, 20))
    assert center_crop(image, image_size=(8, 8)).shape == (8, 8, 3)
    with pytest.raises(BrokenImage, match="21 by 10 pixels"):
        center_crop(Image.fromarray(noise(0, 10, 21)), image_size=(8, 8))


@pytest.mark.parametrize("size", [(100, 10), (10, 100)])
def test_a_hair_is_cropped_as_any_image_without_being_enlarged_whole(size, monkeypatch):
    data = encode(noise(0, *size) // 4 + 96)  # far from what would be cut off on the way
    whole = center_crop(data, image_size=(24, 32), crop_pct=0.9)
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    part = center_crop(data, image_size=(24, 32), crop_pct=0.9)
    assert np.abs(part.astype(int) - whole).max() <= 1


JPEG = numbered_jpeg(0, 60, 80)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"text",
        b"BM",
        b"II*\0",
        b"GIF89a" + bytes(40),
        JPEG[:30],
        JPEG[: len(JPEG) // 2],
        encode(noise(0, 9, 9))[:80],
    ],
)
@pytest.mark.parametrize("decoder", [decode_image, "train", "eval"])
def test_broken_images(data, decoder):
    decode = {
        "train": lambda data: crop_with(0, data),
        "eval": lambda data: center_crop(data, image_size=(8, 8)),
    }.get(decoder, decoder)
    with pytest.raises(BrokenImage):
        decode(data)


def test_what_is_no_image_is_told_what_would_be():
    known = "not a JPEG, PNG or WebP image, nor a GIF, BMP, TIFF, PPM, AVIF or HEIF"
    for data in (b"%PDF-1.7", b"\0\0\0\x18ftypisom\0\0\2\0isomiso2"):
        with pytest.raises(BrokenImage, match=known):
            decode_image(data)
    with pytest.raises(BrokenImage, match=r"^the file is empty$"):
        decode_image(b"")


def test_random_crop_is_a_function_of_its_generator():
    np.testing.assert_array_equal(crop_with(3, JPEG), crop_with(3, JPEG))
    assert crop_with(3, JPEG).shape == (24, 32, 3)
    assert not np.array_equal(crop_with(3, JPEG), crop_with(4, JPEG))


def test_random_crop_of_the_whole_image_is_a_resize():
    pixels = decode_image(JPEG)
    expected = np.asarray(Image.fromarray(pixels).resize((32, 24), Image.Resampling.BICUBIC))
    whole = {"scale": (1.0, 1.0), "ratio": (4 / 3, 4 / 3)}
    np.testing.assert_array_equal(crop_with(0, encode(pixels), **whole), expected)
    assert np.abs(crop_with(0, JPEG, **whole).astype(int) - expected).mean() < 1


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
    options = {"scale": (0.5, 1.0), "resize": "fast"}
    fast = [crop_with(seed, data, **options) for seed in range(8)]
    monkeypatch.setattr("cait_jax.data.decode._jpeg_reduction", lambda *_: 1)
    full = [crop_with(seed, data, **options) for seed in range(8)]
    difference = np.abs(np.array(fast).astype(int) - np.array(full))
    assert 0 < difference.mean() < 0.6
    assert difference.max() <= 4


def photographs():
    recorded = np.load(FIXTURE)
    return [recorded[key].tobytes() for key in recorded if key.endswith("/jpeg")]


def pillow_crop(data, seed, image_size, mode="RGB"):
    """As timm does it: decoded by `Image.open`, cropped, resized."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert(mode)
    rng = np.random.default_rng(seed)
    box = sample_box(rng, (image.height, image.width), scale=SCALE, ratio=RATIO)
    top, left, height, width = box
    crop = image.crop((left, top, left + width, top + height))
    crop = np.asarray(crop.resize(image_size[::-1], Image.Resampling.BICUBIC)).astype(int)
    return crop.reshape(*image_size, -1), math.sqrt(height * width / math.prod(image_size))


@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_crops_are_those_of_pillow(subsampling, progressive, channels):
    shrinks = []
    for number, photograph in enumerate(photographs()):
        image = Image.open(io.BytesIO(photograph)).convert("RGB")
        image = image.resize((image.width * 2 - 1, image.height * 2 + 1))
        options = {"quality": 85, "subsampling": subsampling, "progressive": progressive}
        data = file_of(image, "JPEG", **options)
        for size in ((900, 850), (224, 224), (128, 160), (48, 48)):
            mode = "L" if channels == 1 else "RGB"
            expected, shrink = pillow_crop(data, number, size, mode)
            crop = crop_with(number, data, size, channels=channels)
            assert np.percentile(np.abs(crop - expected), 99.9) <= 1
            shrinks.append(shrink)
    assert min(shrinks) < 0.5
    assert max(shrinks) > 8


@pytest.mark.parametrize("mode", ["L", "CMYK"])
def test_crops_of_other_jpegs_are_those_of_pillow(mode):
    for number, photograph in enumerate(photographs()[:3]):
        image = Image.open(io.BytesIO(photograph)).convert(mode)
        data = file_of(image, "JPEG", quality=90)
        expected, _ = pillow_crop(data, number, (96, 96))
        np.testing.assert_array_equal(crop_with(number, data, (96, 96)), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("image_size", [(224, 224), (64, 96), (1000, 100)])
def test_fast_crops_are_exact_ones_but_for_a_grey_level(channels, image_size):
    def crops(resize):
        options = {"image_size": image_size, "channels": channels, "resize": resize}
        return [
            crop_with(seed, data, **options).astype(int)
            for data in photographs()
            for seed in range(3)
        ]

    fast = crops("fast")
    assert fast[0].shape == (*image_size, channels)
    differences = [np.abs(a - b) for a, b in zip(fast, crops("exact"), strict=True)]
    assert 0 < np.mean([difference.mean() for difference in differences]) < 1.5
    assert max(difference.mean() for difference in differences) < 6
    assert np.percentile(np.concatenate([d.ravel() for d in differences]), 99) <= 13


def test_a_way_to_resize_that_does_not_exist():
    for crop in (random_resized_crop, simple_random_crop):
        with pytest.raises(UserError, match="resize is 'exakt'; nearest: exact"):
            crop(JPEG, np.random.default_rng(0), image_size=(8, 8), resize="exakt")


@pytest.mark.parametrize("resize", ["exact", "fast"])
def test_what_shrinks_in_a_crop_is_antialiased_whatever_the_other_side_does(resize):
    stripes = np.zeros((40, 400, 3), np.uint8)
    stripes[:, ::2] = 255
    data = encode(stripes, "JPEG", quality=100, subsampling=0)
    whole = {"scale": (1.0, 1.0), "ratio": (10.0, 10.0), "resize": resize}
    for height in (20, 40, 80):
        crop = crop_with(0, data, image_size=(height, 100), **whole)
        assert np.ptp(crop[:, 2:-2]) <= 6  # the filter is cut off at the edge
        assert abs(crop.mean() - 127.5) < 2


def reference_simple_crop(data, size, top, left):
    """torchvision's Resize(size, BICUBIC) and RandomCrop(size, padding=4, padding_mode="reflect"), by indices."""
    with Image.open(io.BytesIO(data)) as image:
        image = image.convert("RGB")
    width, height = image.size
    long = int(size * max(width, height) / min(width, height))
    width, height = (size, long) if width <= height else (long, size)
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))

    def reflected(start, side):
        places = np.abs(np.arange(start - 4, start - 4 + size))
        return np.where(places >= side, 2 * (side - 1) - places, places)

    return pixels[reflected(top, height)][:, reflected(left, width)]


@pytest.mark.parametrize("shape", [(60, 80), (90, 50), (40, 40), (300, 31)])
def test_simple_random_crop(shape):
    data, size = numbered_jpeg(2, *shape), 32
    places = set()
    for seed in range(40):
        crop = simple_random_crop(data, np.random.default_rng(seed), image_size=(size, size))
        rng = np.random.default_rng(seed)
        short, long = size, int(size * max(shape) / min(shape))
        height, width = (long, short) if shape[0] >= shape[1] else (short, long)
        top, left = int(rng.integers(height + 9 - size)), int(rng.integers(width + 9 - size))
        np.testing.assert_array_equal(crop, reference_simple_crop(data, size, top, left))
        places |= {("top", top), ("left", left)}
    short_side = "left" if width == size else "top"
    assert {(short_side, place) for place in range(9)} <= places


def test_simple_random_crop_of_another_shape_follows_orientation():
    seen = noise(0, 10, 20) // 4 + 96
    for orientation in STORED:
        data = turned(seen, orientation)
        crop, plain = (
            simple_random_crop(file, np.random.default_rng(3), image_size=(8, 12), exif=True)
            for file in (data, encode(seen))
        )
        assert crop.shape == (8, 12, 3)
        np.testing.assert_array_equal(crop, plain)


def test_simple_random_crop_of_a_hair_is_a_part_of_it(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 1000)
    for shape in ((4, 200), (200, 4)):
        data = encode(np.full((*shape, 3), 90, np.uint8))
        crop = simple_random_crop(data, np.random.default_rng(0), image_size=(20, 20))
        np.testing.assert_array_equal(crop, np.full((20, 20, 3), 90))


@pytest.mark.parametrize("mode", ["CMYK", "L", "RGB"])
def test_jpegs_of_every_mode_are_cropped_right(mode):
    pixels = np.full((50, 60, 3), 130, np.uint8) if mode == "L" else np.zeros((50, 60, 3), np.uint8)
    if mode != "L":
        pixels[:] = (220, 30, 40)
    crop = crop_with(0, encode(pixels, "JPEG", mode=mode))
    assert np.abs(crop.astype(int) - pixels[0, 0]).max() <= 4


@pytest.mark.parametrize("cut", [0.3, 0.9, 0.999])
def test_a_jpeg_that_was_cut_short_is_broken_in_training_too(cut):
    for data in photographs()[:2]:
        with pytest.raises(BrokenImage, match="truncated"):
            crop_with(0, data[: int(len(data) * cut)], scale=(0.1, 0.2))
