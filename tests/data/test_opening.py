"""Files whose pixels are whole, whatever else they hold; and files that are not read."""

import io
import struct
import subprocess
import sys
import types
import warnings
import zlib

import numpy as np
import pytest
from odd_files import bmp, jpeg_with, packed, png, png_chunk, segment, tiff
from PIL import Image, features
from tfds_files import encode, noise, numbered_jpeg

from cait_jax import Preprocessing
from cait_jax.data import image_files
from cait_jax.data.decode import center_crop, decode_image, random_resized_crop
from cait_jax.data.split import BrokenImage

RAMP = np.arange(32) * np.ones((8, 1), int) * 8
PIXELS = np.stack([RAMP, RAMP[:, ::-1], RAMP], -1)
LONG = zlib.compress(bytes(2 * 2**20))
JPEG = numbered_jpeg(0, 40, 50)
# A ramp of 8 by 16, by imagecodecs 2026.3.6: jpeg8_encode(levels, lossless=True).
LOSSLESS = bytes.fromhex(
    "ffd8ffe000104a46494600010100000100010000ffc3000b080008001001011100ffc400160001010100000000000000"
    "000000000000050008ffda0008010100010000cfe8a28a28a28a28a28a28a28c8a28a28a28a28a28a28a28c8a28a28a2"
    "8a28a28a28a28c8a28a28a28a28a28a28a28c8a28a28a28a28a28a28a28c8a28a28a28a28a28a28a28c8a28a28a28a28"
    "a28a28a28c8a28a28a28a28a28a28a28ff00ffd9"
)


def everywhere(data):
    """What training, evaluation and prediction say of a file: whether it can be read."""
    rng = np.random.default_rng(0)
    ways = (
        decode_image,
        lambda data: center_crop(data, image_size=(8, 8), exif=True),
        lambda data: random_resized_crop(data, rng, image_size=(8, 8), exif=True),
        lambda data: random_resized_crop(data, rng, image_size=(8, 8), resize="fast"),
        Preprocessing((8, 8)).crop,
    )
    answers = []
    for way in ways:
        try:
            answers.append(way(data) is not None)
        except BrokenImage:
            answers.append(False)
    return answers


@pytest.mark.parametrize(
    "data",
    [
        png(PIXELS, 8, 2, (b"iCCP", b"p\0\0" + LONG)),
        png(PIXELS, 8, 2, (b"iCCP", b"p\0\1" + LONG)),
        png(PIXELS, 8, 2, (b"zTXt", b"k\0\0" + LONG)),
        png(PIXELS, 8, 2, (b"iTXt", b"k\0\1\0\0\0" + LONG)),
        png(PIXELS, 8, 2, after=[(b"zTXt", b"k\0\0" + LONG)]),
        png(PIXELS, 8, 2, *[(b"tEXt", b"k\0" + b"x" * 2**20)] * 66),
        png(PIXELS, 8, 2, png_chunk(b"tEXt", b"k\0x", crc=1)),
        png(PIXELS, 8, 2, png_chunk(b"tRNS", bytes(6), crc=1)),
        png(PIXELS, 8, 2, png_chunk(b"eXIf", b"MM\0*", crc=1)),
        png(PIXELS, 8, 2, (b"gAMA", b"\0")),
        png(PIXELS, 8, 2, (b"pHYs", b"\0")),
        png(PIXELS, 8, 2, (b"acTL", b"\0")),
        png(PIXELS, 8, 2, (b"acTL", bytes(8))),
        png(PIXELS, 8, 2)[:-12],
        png(PIXELS, 8, 2) + b"more",
    ],
    ids=[
        "profile", "profile's method", "text", "international text", "text at the end", "many texts",
        "text's sum", "transparency's sum", "EXIF's sum", "gamma", "density", "animation", "frames",
        "no end", "more",
    ],
)  # fmt: skip
def test_what_is_not_pixels_spoils_no_png(data):
    np.testing.assert_array_equal(decode_image(data), PIXELS)
    assert all(everywhere(data))


@pytest.mark.parametrize(
    "parts",
    [
        [segment(0xED, b"Photoshop 3.0\0" + b"8BIM\3")],
        [segment(0xE2, b"ICC_PROFILE\0")],
        [segment(0xE2, b"ICC_PROFILE\0\1\2abc")],
        [segment(0xE0, b"JFIF\0")],
        [segment(0xEE, b"Adobe")],
        [segment(0xE1, b"Exif\0\0junk")],
        [segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<")],
        [segment(0xE2, b"MPF\0junk")],
        [segment(0xFE, b"x" * 65000)] * 40,
    ],
    ids=[
        "photoshop",
        "profile",
        "part of a profile",
        "JFIF",
        "Adobe",
        "EXIF",
        "XMP",
        "MPF",
        "comments",
    ],
)
def test_what_is_not_pixels_spoils_no_jpeg(parts):
    data = jpeg_with(JPEG, *parts)
    np.testing.assert_array_equal(decode_image(data), decode_image(JPEG))
    assert all(everywhere(data))


def test_adobe_says_which_colours_a_jpeg_has():
    """Without its segment, RGB stored as it is would be taken for YCbCr."""
    data = encode(PIXELS.astype(np.uint8), "JPEG", quality=95, keep_rgb=True)
    assert np.abs(decode_image(data).astype(int) - PIXELS).max() < 12


def test_orientation_of_a_jpeg_is_kept_among_other_segments():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(0, 20, 40), "JPEG", exif=exif, comment=b"x", icc_profile=bytes(200))
    upright, stored = (center_crop(data, image_size=(20, 20), exif=exif) for exif in (True, False))
    np.testing.assert_array_equal(upright, np.rot90(stored, -1))


def test_a_lossless_jpeg_is_read_everywhere_or_nowhere():
    assert len(set(everywhere(LOSSLESS))) == 1
    if (
        features.check_feature("libjpeg_turbo")
        and int(features.version("libjpeg_turbo").split(".")[0]) >= 3
    ):
        np.testing.assert_array_equal(decode_image(LOSSLESS)[3, :, 0], np.arange(16) * 17)


def test_every_way_agrees_on_damaged_jpegs():
    rng = np.random.default_rng(0)
    whole = broken = 0
    for number in range(150):
        data = bytearray(numbered_jpeg(number, 60, 80))
        for _ in range(rng.integers(1, 4)):
            data[rng.integers(2, len(data))] = rng.integers(256)
        answers = everywhere(bytes(data))
        assert len(set(answers)) == 1
        whole, broken = whole + answers[0], broken + (not answers[0])
    assert whole > 20
    assert broken > 20


def frame(marker, bits):
    header = struct.pack(">BHHB", bits, 8, 8, 1) + b"\1\x11\0"
    return b"\xff\xd8" + segment(marker, header) + segment(0xDA, b"\1\1\0\0\x3f\0") + b"\xff\xd9"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (frame(0xC1, 12), "a JPEG of 12 bits a sample, which cannot be read; save it with 8 bits"),
        (frame(0xC3, 16), "a JPEG of 16 bits a sample"),
        (frame(0xF7, 8), "a JPEG-LS, which cannot be read; save it as PNG"),
        (JPEG[:100], "its header is damaged or cut short|Truncated"),
        (tiff(RAMP, 8)[:200], "its header is damaged or cut short"),
        (encode(noise(0, 20, 20), "WEBP")[:-100], "it is damaged or cut short"),
    ],
)
def test_what_cannot_be_read_says_why(data, message):
    assert not any(everywhere(data))
    with pytest.raises(BrokenImage, match=message):
        decode_image(data)


@pytest.mark.parametrize(("key", "bits"), [(0, 1), (1, 2), (5, 4), (100, 8), (1000, 16)])
def test_a_transparent_level_of_a_grey_png_becomes_white(key, bits):
    levels = (
        np.arange(8) * np.ones((4, 1), int) * (2**bits // 8)
        if bits > 2
        else np.tile([[0, 1]], (4, 4))
    )
    levels[1, 1] = key
    expected = np.rint(levels * 255 / (2**bits - 1)) if bits < 16 else levels >> 8
    expected[levels == key] = 255
    data = png(levels, bits, 0, (b"tRNS", struct.pack(">H", key)))
    np.testing.assert_array_equal(decode_image(data, channels=1)[..., 0], expected)


def test_a_transparent_colour_of_sixteen_bits_is_told_from_its_neighbours():
    levels = np.full((4, 4, 3), 1001)
    levels[2, 3] = 1000
    decoded = decode_image(png(levels, 16, 2, (b"tRNS", struct.pack(">3H", 1000, 1000, 1000))))
    expected = np.full((4, 4, 3), 1001 >> 8)
    expected[2, 3] = 255
    np.testing.assert_array_equal(decoded, expected)


BGR_MASKS = (0xFF0000, 0xFF00, 0xFF)


@pytest.mark.parametrize("header", [56, 108, 124])
@pytest.mark.parametrize("masks", [(*BGR_MASKS, 0xFF000000), (*BGR_MASKS, 0), (0, 0, 0, 0)])
def test_a_fourth_byte_of_zeros_in_a_bmp_is_no_transparency(header, masks):
    pixels = np.concatenate([PIXELS[..., ::-1], np.zeros((8, 32, 1), int)], -1).astype(np.uint8)
    np.testing.assert_array_equal(decode_image(bmp(pixels, masks, header=header)), PIXELS)


def test_alpha_of_a_bmp_that_is_there_counts():
    pixels = np.concatenate([PIXELS[..., ::-1], np.zeros((8, 32, 1), int)], -1).astype(np.uint8)
    pixels[2, 3, 3] = 255
    decoded = decode_image(bmp(pixels, (*BGR_MASKS, 0xFF000000)))
    np.testing.assert_array_equal(decoded[2, 3], PIXELS[2, 3])
    decoded[2, 3] = 255
    assert np.all(decoded == 255)


@pytest.mark.parametrize("image_format", ["PNG", "WEBP"])
def test_alpha_of_zeros_counts_where_it_is_declared(image_format):
    pixels = np.concatenate([PIXELS, np.zeros((8, 32, 1), int)], -1).astype(np.uint8)
    options = {"lossless": True, "exact": True} if image_format == "WEBP" else {}
    assert np.all(decode_image(encode(pixels, image_format, **options)) == 255)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P5 4 1 4095 " + np.array([0, 1365, 2730, 4095], ">u2").tobytes(), [0, 85, 170, 255]),
        (b"P5 4 1 65535 " + np.array([0, 100, 250, 65535], ">u2").tobytes(), [0, 0, 0, 255]),
        (b"P5 4 1 65535 " + np.array([0, 100, 200, 250], ">u2").tobytes(), [0, 0, 0, 0]),
        (b"P5 4 1 15 " + bytes([0, 5, 10, 15]), [0, 85, 170, 255]),
        (b"P1 4 1 1 0 1 0 ", [0, 255, 0, 255]),
        (b"P2\n# c\n4 1 255 1 2 3 4 ", [1, 2, 3, 4]),
    ],
)
def test_portable_maps_say_what_white_is(data, expected):
    np.testing.assert_array_equal(decode_image(data, channels=1)[0, :, 0], expected)


@pytest.mark.skipif("avif" not in features.get_supported(), reason="Pillow is without AVIF")
@pytest.mark.parametrize("orientation", [1, 6])
def test_avif(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(PIXELS.astype(np.uint8)).resize((64, 32))
    file = io.BytesIO()
    image.save(file, "AVIF", quality=100, subsampling="4:4:4", exif=exif)
    seen = np.asarray(image) if orientation == 1 else np.rot90(np.asarray(image), -1)
    size = seen.shape[:2]
    crop = center_crop(file.getvalue(), image_size=size, exif=True)
    assert np.abs(crop.astype(int) - seen).mean() < 3
    assert not any(everywhere(file.getvalue()[:-50]))


def container(brand, *others):
    box = b"ftyp" + brand + bytes(4) + b"".join(others)
    return struct.pack(">I", len(box) + 4) + box + bytes(40)


@pytest.mark.parametrize("data", [container(b"heic"), container(b"mif1", b"mif1", b"heix")])
def test_heif_needs_its_extra(data, monkeypatch):
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        BrokenImage, match=r'HEIF needs pillow-heif: pip install "cait-jax\[heif\]"'
    ):
        decode_image(data)


def test_heif_by_its_extra(monkeypatch):
    class HeifImageFile(Image.Image):
        def __init__(self, file):
            super().__init__()
            assert file.read().startswith(b"\0\0\0\x10ftypheic")
            image = Image.new("RGB", (4, 3), "red")
            self.im, self._mode, self._size = image.im, image.mode, image.size

    module = types.ModuleType("pillow_heif")
    module.HeifImageFile = HeifImageFile
    monkeypatch.setitem(sys.modules, "pillow_heif", module)
    monkeypatch.setattr(image_files.importlib.util, "find_spec", lambda name: object())
    red = np.full((3, 4, 3), (255, 0, 0))
    np.testing.assert_array_equal(decode_image(container(b"heic")), red)


def test_a_brand_of_avif_among_others_is_avif(monkeypatch):
    monkeypatch.setattr(features, "get_supported", list)
    with pytest.raises(BrokenImage, match="AVIF needs a newer Pillow: pip install"):
        decode_image(container(b"mif1", b"miaf", b"avif"))


DEFLATED = zlib.compress(packed(RAMP, 8))
NOISY = {
    "cut deflate": tiff(RAMP, 8, compression=8, data=DEFLATED[:-30] + bytes(30)),
    "cut LZW": tiff(RAMP, 8, compression=5, data=b"\x80junk" * 20),
    "JPEG in TIFF": tiff(RAMP, 8, compression=7, data=JPEG[:200]),
    "12 bits, cut": tiff(RAMP, 12, compression=8, data=DEFLATED[:-30]),
    "unknown tag": tiff(RAMP * 256, 16, tags=[(33550, 11, (1.0, 2.0, 3.0)), (65000, 3, (1,))]),
    "no ExtraSamples": tiff(np.concatenate([PIXELS, PIXELS[..., :1]], -1), 16),
    "75 samples": tiff(RAMP, 8, tags=[(277, 3, (75,))]),
    "NaN that signals": tiff(RAMP, 32, data=b"\1\0\x80\x7f" * RAMP.size, tags=[(339, 3, (3,))]),
    "profile": png(PIXELS, 8, 2, (b"iCCP", b"p\0\0junk")),
    "animation": png(PIXELS, 8, 2, (b"acTL", bytes(8))),
    "EXIF": jpeg_with(JPEG, segment(0xE1, b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\1\3\0\1\0\0\0\6\0\0\0")),
    "damaged": JPEG[:400] + bytes(20) + JPEG[420:],
    "palette": encode(noise(0, 8, 8), mode="P", transparency=bytes(range(256))),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISY)
def test_libraries_are_silent(name, capfd):
    """On standard error, where they name no file, and as warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        everywhere(NOISY[name])
    assert capfd.readouterr() == ("", "")
    assert not caught


def test_the_users_own_warnings_stay():
    code = (
        "import io, warnings; from cait_jax.data.decode import decode_image; from PIL import Image; "
        f"decode_image({encode(noise(0, 4, 4))!r}); warnings.warn('mine'); Image.MAX_IMAGE_PIXELS = 10; "
        f"Image.open(io.BytesIO({encode(noise(0, 4, 4))!r}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0
    assert "UserWarning: mine" in run.stderr
    assert "DecompressionBombWarning" in run.stderr
