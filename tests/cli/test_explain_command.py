"""`cait explain` on a saved model: pictures, numbers, and what it refuses."""

import jax
import numpy as np
import pytest
from PIL import Image
from test_commands import cait

from cait_jax import create_model, load_pretrained, preprocessing, save_pretrained
from cait_jax.cli.explain import _scores
from cait_jax.explain import attribution

SHOWN = ("attribution", "attention", "patch", "matrices", "depth", "patches")
PARTS = (
    "attribution", "attention", "read_by_patch", "readers_of_patch", "matrices", "depth", "patches",
    "flattened",
)  # fmt: skip
EVERYTHING = [word for part in SHOWN for word in ("--show", part)]
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers")


@pytest.mark.slow
def test_pictures_and_numbers_of_a_folder(saved, photographs, tmp_path):
    out, err = cait(
        "explain", photographs, "-m", saved, "--methods", "all", "--steps", 4, *EVERYTHING,
        "-o", tmp_path / "seen", status=1,
    )  # fmt: skip
    assert "1 of 8 images were left out" in err
    written = {path.name for path in (tmp_path / "seen").iterdir()}
    assert {f"{i}.{part}.png" for i in range(7) for part in PARTS} <= written
    assert {"contact_sheet.png", "filters.png", "principal_filters.png", "positions.png"} <= written
    for path in (tmp_path / "seen").glob("*.png"):
        with Image.open(path) as picture:
            assert min(picture.size) > 100, path
            assert len(set(picture.convert("L").get_flattened_data())) > 10, path

    model, variables = load_pretrained(saved)
    image = photographs / "sparrow" / "1.png"
    prepare = preprocessing(saved)
    top = model.apply(variables, prepare(image)).argmax(-1)
    with np.load(tmp_path / "seen" / "1.npz") as numbers:
        np.testing.assert_array_equal(numbers["image"], prepare.crop(image))
        np.testing.assert_array_equal(numbers["classes"], top)
        for method in attribution.METHODS:
            expected = attribution.attribute(method, model, variables, prepare(image), top)
            found = numbers[f"attribution/{method}"]
            np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
        assert numbers["deletion/random"].shape == (1, 5)
        assert numbers["matrices/mixed_weights"].shape == (4, 4, 4)
    for method in (*attribution.METHODS, "random", "centre"):
        assert method in out
    assert "±" in out


@pytest.mark.slow
def test_an_image_of_a_class(saved, photographs, tmp_path):
    image = photographs / "teapot" / "2.png"
    out, _ = cait(
        "explain", image, "-m", saved, "--class", "Teapot", "--class", "n01440764", "--method",
        "relevance", "--format", "svg", "-o", tmp_path,
    )  # fmt: skip
    names = ["2.npz", "2.attribution.svg", "2.attribution-2.svg"]
    assert out.split() == [str(tmp_path / name) for name in names]
    with np.load(tmp_path / "2.npz") as numbers:
        assert numbers["classes"].tolist() == [2, 0]
        assert numbers["attribution/relevance"].shape == (2, 2, 2)
    first = (tmp_path / "2.attribution.svg").read_bytes()
    cait(
        "explain", image, "-m", saved, "--class", "2", "--method", "relevance", "--format", "svg", "-o",
        tmp_path,
    )  # fmt: skip
    assert (tmp_path / "2.attribution.svg").read_bytes() == first


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Saved models without a class token, without a head, without attention."""
    root = tmp_path_factory.mktemp("others")
    settings = {"image_size": [32, 32], "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 3}
    small = {"depth": 1, "num_classes": 2}
    for name, of in (
        ("mean", ("cait_xxs24", {**small, "class_token": "mean"})),
        ("headless", ("vit_tiny", {"depth": 1, "num_classes": 0})),
        (
            "regnet",
            ("regnety_160", {**small, "w0": 8, "wa": 8.0, "wm": 2.0, "depth": 4, "group_width": 8}),
        ),
    ):
        model = create_model(of[0], image_size=32, **of[1])
        variables = model.init(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32))
        save_pretrained(root / name, model, variables, preprocessing=settings)
    return root


@pytest.mark.parametrize(
    ("model", "arguments", "sentence"),
    [
        ("saved", ["--class", "dragon"], "--class: there is no class 'dragon'"),
        ("saved", ["--class", "teapt"], "teapot"),
        (
            "saved",
            ["--show", "patch", "--patch", 4],
            "no --patch 4: an image has 2 x 2, counted row by row",
        ),
        (
            "saved",
            ["--show", "matrices", "--layer", 9],
            "no --layer 9: they are counted from 0 to 2",
        ),
        ("saved", ["-o", "no/where"], "there is no directory no"),
        ("mean", ["--method", "class_attention"], "this network has no class token"),
        ("mean", ["--show", "attention"], "this network has no class token"),
        ("headless", ["--class", "0"], "this network has no head"),
        ("headless", ["--method", "relevance"], "this network has no head"),
        ("headless", ["--methods", "all"], "this network has no head"),
        ("regnet", [], "is a RegNetY, a convolutional network without attention"),
    ],
)
def test_what_does_not_fit_is_one_sentence(model, arguments, sentence, saved, others, photographs):
    directory = saved if model == "saved" else others / model
    image = photographs / "sparrow" / "1.png"
    _, err = cait("explain", image, "-m", directory, *arguments, status=1)
    assert sentence in err.splitlines()[-1]


def test_an_image_with_fewer_pixels_than_patches_is_left_out(saved, tmp_path):
    Image.new("RGB", (1, 5)).save(tmp_path / "thin.png")
    _, err = cait("explain", tmp_path / "thin.png", "-m", saved, "-o", tmp_path / "o", status=1)
    assert "thin.png is left out: its shorter side has 1 pixels, fewer than the 2 patches" in err
    assert "every image is left out: give larger ones" in err.splitlines()[-1]
    assert not (tmp_path / "o").exists()


def test_the_scores_of_one_image_have_no_error():
    curve = np.array([[1.0, 0.5, 0.0]])
    maps = {"random": curve, "centre": curve / 2}
    one = {"deletion": maps, "insertion": {name: c[:, ::-1] for name, c in maps.items()}}
    assert "±" not in _scores([one])
    assert "nan" not in _scores([one])
    both = _scores([one, one])
    assert both.count("0.5000 ± 0.0000") == 2
    assert "-0.2500 ± 0.0000" in both  # deletion: the centre's area is the smaller one
    assert " 0.2500 ± 0.0000" in both
