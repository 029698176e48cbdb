"""Depths, ranges, orders and transparency that TIFF files declare: white becomes 255, whatever its level."""

import io
import zlib

import numpy as np
import pytest
from odd_files import packed, tiff
from PIL import Image
from tfds_files import encode

from cait_jax import Preprocessing
from cait_jax.data import decode
from cait_jax.data.decode import center_crop, decode_image
from cait_jax.data.split import BrokenImage

ORDERS = pytest.mark.parametrize("order", ["<", ">"])


def ramp(white, shape=()):
    """Levels from 0 to white along a row, and from 0 to 255; more samples run the other way."""
    levels = np.rint(np.linspace(0, white, 32)) * np.ones((8, 1))
    grey = levels * (255 / white)
    if shape:
        levels, grey = (np.stack([a, a[:, ::-1], a], -1) for a in (levels, grey))
    return levels.astype(np.int64), grey


@ORDERS
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 10, 12, 14, 16])
@pytest.mark.parametrize("compression", [1, 8])
def test_grey_of_any_depth(order, bits, compression):
    levels, grey = ramp(2**bits - 1)
    data = packed(levels, bits, order)
    data = zlib.compress(data) if compression == 8 else data
    decoded = decode_image(tiff(levels, bits, order=order, compression=compression, data=data))
    assert decoded.max() == 255
    assert decoded.min() == 0
    assert np.abs(decoded - grey[..., None]).max() < 1


@ORDERS
@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
def test_colours_of_any_depth(order, bits):
    levels, colours = ramp(2**bits - 1, (3,))
    decoded = decode_image(tiff(levels, bits, order=order))
    assert decoded.max() == 255
    assert np.abs(decoded - colours).max() < 1


@ORDERS
@pytest.mark.parametrize("bits", [1, 4, 8, 12, 16])
def test_white_may_be_zero(order, bits):
    levels, grey = ramp(2**bits - 1)
    decoded = decode_image(tiff(2**bits - 1 - levels, bits, order=order, photometric=0))
    assert np.abs(decoded - grey[..., None]).max() < 1


@ORDERS
@pytest.mark.parametrize("tag", [281, 341])
def test_a_greatest_value_of_all_ones_states_the_depth(order, tag):
    levels, grey = ramp(4095)
    file = tiff(levels, 16, order=order, tags=[(tag, 3, (4095,))])
    assert np.abs(decode_image(file) - grey[..., None]).max() < 1


@pytest.mark.parametrize("stated", [4094, 3000, 1023, 0])
def test_a_greatest_value_that_states_no_depth_changes_nothing(stated):
    levels, _ = ramp(4095)
    decoded = decode_image(tiff(levels, 16, tags=[(281, 3, (stated,))]), channels=1)
    np.testing.assert_array_equal(decoded[..., 0], levels >> 8)


@ORDERS
@pytest.mark.parametrize(("bits", "white"), [(8, 127), (16, 32767)])
def test_of_signed_levels_the_greatest_is_white_and_what_is_below_zero_black(order, bits, white):
    levels, grey = ramp(white)
    levels[0, :5], grey[0, :5] = -white, 0
    file = tiff(levels % 2**bits, bits, order=order, tags=[(339, 3, (2,))])
    assert np.abs(decode_image(file) - grey[..., None]).max() <= 1


@ORDERS
@pytest.mark.parametrize("white", [255, 65535, 2**32 - 1])
def test_unsigned_levels_of_thirty_two_bits(order, white):
    levels, grey = ramp(white)
    decoded = decode_image(tiff(levels, 32, order=order))
    assert np.abs(decoded - grey[..., None]).max() <= 1


@ORDERS
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("photometric", [0, 1, 2])
def test_floats(order, bits, photometric):
    _, grey = ramp(255, (3,) if photometric == 2 else ())
    levels = (255 - grey if photometric == 0 else grey) / 255
    data = levels.astype(f"{order}f{bits // 8}").tobytes()
    file = tiff(grey, bits, order=order, photometric=photometric, data=data, tags=[(339, 3, (3,))])
    expected = grey if photometric == 2 else grey[..., None]
    assert np.abs(decode_image(file) - expected).max() <= 0.51


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("extra", "transparent"), [(None, False), (0, False), (1, True), (2, True)]
)
def test_a_fourth_sample_of_zeros_is_transparency_only_where_it_is_declared(
    bits, extra, transparent
):
    levels, colours = ramp(2**bits - 1, (3,))
    levels = np.concatenate([levels, np.zeros((8, 32, 1), int)], -1)
    tags = [] if extra is None else [(338, 3, (extra,))]
    decoded = decode_image(tiff(levels, bits, tags=tags))
    if extra == 1:  # colours are multiplied by it, so that these are none
        return
    assert np.abs(decoded - (255 if transparent else colours)).max() < 1


@pytest.mark.parametrize("bits", [8, 12, 16])
@pytest.mark.parametrize("extra", [None, 2])
def test_a_fourth_sample_that_is_not_zero_is_transparency(bits, extra):
    levels, colours = ramp(2**bits - 1, (3,))
    alpha = np.zeros((8, 32, 1), int)
    alpha[:4] = 2**bits - 1
    tags = [] if extra is None else [(338, 3, (extra,))]
    decoded = decode_image(tiff(np.concatenate([levels, alpha], -1), bits, tags=tags))
    assert np.abs(decoded[:4] - colours[:4]).max() < 1
    assert np.all(decoded[4:] == 255)


@pytest.mark.parametrize("bits", [8, 16])
def test_colours_may_be_multiplied_by_alpha(bits):
    levels, colours = ramp(2**bits - 1, (3,))
    half = np.full((8, 32, 1), 2 ** (bits - 1))
    decoded = decode_image(
        tiff(np.concatenate([levels // 2, half], -1), bits, tags=[(338, 3, (1,))])
    )
    assert np.abs(decoded - (colours / 2 + 127.5)).max() <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("bits", [8, 12, 16])
def test_any_depth_stands_upright(orientation, bits):
    levels = np.arange(48).reshape(6, 8) * (2**bits // 64)
    stored = tiff(levels, bits, tags=[(274, 3, (orientation,))])
    with Image.open(
        io.BytesIO(tiff(levels >> bits - 8, 8, tags=[(274, 3, (orientation,))]))
    ) as image:
        image.load()
        expected = np.asarray(image)
    for exif in (True, False):
        crop = center_crop(stored, image_size=expected.shape, channels=1, exif=exif)
        assert np.abs(crop[..., 0].astype(int) - expected).max() <= 1


@pytest.mark.parametrize("bits", [6, 24])
def test_a_depth_that_cannot_be_read_is_named(bits):
    levels = np.zeros((8, 8), int)
    with pytest.raises(BrokenImage, match=f"TIFF of 1 sample of {bits} bits .*; save it as PNG"):
        decode_image(tiff(levels, bits, data=bytes(8 * bits)))


def test_deep_planes_are_refused_and_not_taken_for_interleaved():
    levels, _ = ramp(65535, (3,))
    planes = b"".join(packed(levels[..., i], 16) for i in range(3))
    tags = [(284, 3, (2,)), (273, 4, (8, 520, 1032)), (279, 4, (512,) * 3)]
    with pytest.raises(BrokenImage, match="3 samples of 16 bits"):
        decode_image(tiff(levels, 16, data=planes, tags=tags))


@pytest.mark.parametrize("bits", [8, 12, 16])
def test_a_cut_off_strip_is_broken(bits):
    levels, _ = ramp(2**bits - 1)
    with pytest.raises(BrokenImage):
        decode_image(tiff(levels, bits, data=packed(levels, bits)[:50]))


def test_too_many_pixels_of_any_depth_are_refused_unread(monkeypatch):
    monkeypatch.setattr(decode, "MAX_PIXELS", 255)
    for bits in (8, 12):
        with pytest.raises(BrokenImage, match="32 by 8 pixels are 256"):
            decode_image(tiff(*ramp(1)[:1], bits))


@pytest.mark.skipif(not hasattr(Image.core, "libtiff_decoder"), reason="Pillow is without libtiff")
@pytest.mark.parametrize("compression", ["lzma", "zstd"])
def test_compressions_that_opencv_lacks(compression):
    levels, grey = ramp(65535)
    file = io.BytesIO()
    try:
        Image.fromarray(levels.astype(np.uint16)).save(file, "TIFF", compression=compression)
    except (OSError, RuntimeError, KeyError):
        pytest.skip(f"Pillow's libtiff is without {compression}")
    assert np.abs(decode_image(file.getvalue()) - grey[..., None]).max() < 1


def test_large_files():
    """BigTIFF, whose offsets have 64 bits."""
    levels, grey = ramp(65535)
    file = io.BytesIO()
    Image.fromarray(levels.astype(np.uint16)).save(file, "TIFF", big_tiff=True)
    assert np.abs(decode_image(file.getvalue()) - grey[..., None]).max() < 1


def test_an_image_that_pillow_opened_has_its_depth_too():
    levels, grey = ramp(4095)
    with Image.open(io.BytesIO(tiff(levels, 12))) as image:
        crop = Preprocessing((8, 32)).crop(image)
    assert np.abs(crop - grey[..., None]).max() < 1


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr"])
def test_other_colours_are_left_to_pillow(mode):
    levels, colours = ramp(255, (3,))
    data = encode(levels.astype(np.uint8), "TIFF", mode=mode)
    assert np.abs(decode_image(data) - colours).max() <= 3


def test_libtiff_is_silent(capfd):
    levels, _ = ramp(255)
    with pytest.raises(BrokenImage):
        decode_image(tiff(levels, 8, compression=8, data=b"no such thing"))
    assert capfd.readouterr() == ("", "")
