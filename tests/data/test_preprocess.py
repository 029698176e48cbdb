import io
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tfds_files import encode, noise, numbered_jpeg

from cait_jax.augment.pipeline import normalise
from cait_jax.data.decode import center_crop
from cait_jax.data.preprocess import IMAGENET_MEAN, IMAGENET_STD, Preprocessing
from cait_jax.data.split import BrokenImage
from cait_jax.errors import UserError

SMALL = Preprocessing((24, 32), crop_pct=0.9)
JPEG = numbered_jpeg(0, 60, 80)


def message_of(call, *arguments, **options):
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_photograph_is_the_same_in_every_form(tmp_path, monkeypatch):
    pixels = np.asarray(Image.open(io.BytesIO(JPEG)))
    path = tmp_path / "photo.jpg"
    path.write_bytes(JPEG)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = center_crop(JPEG, image_size=(24, 32), crop_pct=0.9)
    forms = [
        JPEG, bytearray(JPEG), memoryview(JPEG), path, str(path), "~/photo.jpg", Image.open(path),
        Image.open(io.BytesIO(JPEG)), pixels, Image.fromarray(pixels),
    ]  # fmt: skip
    for form in forms:
        np.testing.assert_array_equal(SMALL.crop(form), expected)
    for several in (forms, tuple(forms), iter(forms)):
        np.testing.assert_array_equal(SMALL.crops(several), [expected] * len(forms))
    np.testing.assert_array_equal(SMALL.crops(np.stack([pixels] * 2)), [expected] * 2)
    for one in (JPEG, path, str(path), Image.open(path), pixels):
        np.testing.assert_array_equal(SMALL.crops(one), [expected])
    assert SMALL.crops([]).shape == SMALL([]).shape == (0, 24, 32, 3)


def test_arrays_of_any_channels():
    gray = noise(0, 24, 32, 1)
    gray_crop = SMALL.crop(np.repeat(gray, 3, axis=-1))
    np.testing.assert_array_equal(SMALL.crop(gray), gray_crop)
    np.testing.assert_array_equal(SMALL.crop(gray[..., 0]), gray_crop)
    clear = np.zeros((9, 9, 4), np.uint8)
    np.testing.assert_array_equal(SMALL.crop(clear), np.full((24, 32, 3), 255))
    luminance = Preprocessing((24, 32), mean=(0.5,), std=(0.5,), channels=1)
    np.testing.assert_array_equal(luminance.crop(gray), gray)
    assert luminance([gray, JPEG]).shape == (2, 24, 32, 1)


def test_photographs_are_turned_upright_whether_encoded_or_opened():
    seen = noise(0, 24, 32)
    exif = Image.Exif()
    exif[0x0112] = 8
    data = encode(np.ascontiguousarray(np.rot90(seen, -1)), exif=exif)
    whole = Preprocessing((24, 32))
    np.testing.assert_array_equal(whole.crop(data), seen)
    np.testing.assert_array_equal(whole.crop(Image.open(io.BytesIO(data))), seen)
    np.testing.assert_array_equal(whole.crop(Image.open(io.BytesIO(data)).convert("RGB")), seen)


def test_an_opened_image_stays_as_it_was():
    image = Image.fromarray(noise(0, 24, 32)).quantize(8)
    image.info["transparency"] = 3
    before = image.tobytes()
    np.testing.assert_array_equal(SMALL.crop(image), SMALL.crop(image))
    assert (image.mode, image.size, image.info["transparency"]) == ("P", (32, 24), 3)
    assert image.tobytes() == before


@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.5,), (0.25,)), ((0.1, 0.2, 0.3), (1.0,))]
)
def test_normalisation_is_that_of_training(mean, std):
    preprocessing = Preprocessing((24, 32), mean=mean, std=std)
    batch = preprocessing([JPEG, noise(0, 40, 40)])
    assert batch.dtype == np.float32
    crops = preprocessing.crops([JPEG, noise(0, 40, 40)])
    np.testing.assert_allclose(
        batch, (crops / 255 - np.array(mean)) / np.array(std), rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(
        batch, normalise(jnp.asarray(crops), mean, std), rtol=1e-5, atol=1e-6
    )


def test_settings_survive_json():
    settings = Preprocessing((24, 32), 0.875, (0.5,), (0.25,), 1)
    again = Preprocessing.from_dict(json.loads(json.dumps(settings.to_dict())))
    assert again == settings
    assert hash(again) == hash(settings)
    whole = {"image_size": [8, 8], "crop_pct": 1, "mean": [0], "std": [1], "channels": 3}
    assert Preprocessing.from_dict(whole) == Preprocessing((8, 8), mean=(0.0,), std=(1.0,))
    numpy = {
        "image_size": np.array([8, 8]),
        "mean": np.zeros(1, np.float32),
        "std": [np.float64(1)],
    }
    assert Preprocessing.from_dict(whole | numpy) == Preprocessing.from_dict(whole)
    json.dumps(Preprocessing.from_dict(whole | numpy).to_dict())
    old = {"crop_ratio" if name == "crop_pct" else name: value for name, value in whole.items()}
    assert Preprocessing.from_dict(old) == Preprocessing.from_dict(whole)


def test_settings_are_read_strictly():
    settings = SMALL.to_dict()
    assert "no setting 'crop'; nearest: crop_pct" in message_of(
        Preprocessing.from_dict, settings | {"crop": 0.9}
    )
    del settings["std"], settings["channels"]
    assert "lacks std, channels" in message_of(Preprocessing.from_dict, settings)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"channels": "3"}, "channels must be"),
        ({"image_size": 224}, "such as (224, 224), not 224"),
        ({"image_size": "224"}, "such as (224, 224)"),
        ({"image_size": (224,)}, "such as (224, 224)"),
        ({"image_size": (0, 8)}, "such as (224, 224)"),
        ({"image_size": (8.0, 8)}, "such as (224, 224)"),
        ({"image_size": (True, 8)}, "such as (224, 224)"),
        ({"crop_pct": True}, "takes finite numbers, not True"),
        ({"crop_pct": 0}, "above 0 and at most 1"),
        ({"crop_pct": 1.1}, "above 0 and at most 1"),
        ({"crop_pct": "1"}, "takes finite numbers, not '1'"),
        ({"crop_pct": float("nan")}, "takes finite numbers"),
        ({"channels": 4}, "channels must be 3 (RGB) or 1"),
        ({"channels": 1}, "mean has 3 values, but images have 1 channel;"),
        ({"mean": (0.5, 0.5)}, "mean has 2 values, but images have 3 channels;"),
        ({"std": ()}, "std has 0 values"),
        ({"mean": 0.5}, "mean must be a tuple"),
        ({"std": "abc"}, "std must be a tuple"),
        ({"std": (0.5, 0.5, None)}, "std takes finite numbers, not None"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be above 0"),
    ],
)
def test_bad_values_are_refused(values, words):
    settings = Preprocessing((8, 8)).to_dict()
    assert words in message_of(Preprocessing.from_dict, settings | values)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "cat.jpg").write_bytes(JPEG)
    assert "nearest: cat.jpg" in message_of(SMALL, tmp_path / "cta.jpg")
    assert f"there is no image {tmp_path}/no/x.jpg; its folder" in message_of(
        SMALL, f"{tmp_path}/no/x.jpg"
    )
    assert "is a folder; " in message_of(SMALL, tmp_path)
    assert "cannot be read: " in message_of(SMALL, str(tmp_path / "cat.jpg" / "x.jpg"))
    assert "cannot be read: File name too long" in message_of(SMALL, tmp_path / ("x" * 300))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "the file is empty"),
        (b"{}", "not a JPEG, PNG or WebP image"),
        (JPEG[:-200], "truncated"),
        (encode(noise(0, 9, 9))[:-60], ""),
        (JPEG[:30], ""),
    ],
)
def test_a_broken_image_is_named(tmp_path, data, reason):
    path = tmp_path / "broken.jpg"
    path.write_bytes(data)
    with pytest.raises(BrokenImage) as caught:
        SMALL([JPEG, path])
    assert str(caught.value).startswith(f"{path} cannot be decoded: ")
    assert reason in str(caught.value)
    with pytest.raises(BrokenImage, match="image 1 cannot be decoded: "):
        SMALL([JPEG, data])
    with pytest.raises(BrokenImage, match="the image cannot be decoded: "):
        SMALL(data)


def test_a_broken_image_that_was_opened_is_named(tmp_path):
    path = tmp_path / "broken.jpg"
    path.write_bytes(JPEG[:-200])
    with Image.open(path) as image, pytest.raises(BrokenImage, match=r"broken\.jpg cannot be"):
        SMALL(image)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (3, "the image is of type int; give a path"),
        ([JPEG, None], "image 1 is of type NoneType"),
        (np.zeros((8, 8, 3)), "an array of float64 (8, 8, 3); give uint8"),
        (np.zeros((8, 8, 2), np.uint8), "an array of uint8 (8, 8, 2); give uint8"),
        (np.zeros(8, np.uint8), "an array of uint8 (8,); give uint8"),
    ],
)
def test_what_is_no_image_at_all(image, words):
    assert words in message_of(SMALL, image)
