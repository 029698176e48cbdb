"""`cait report` as a user runs it."""

import json
import re

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from trees import random_params

from cait_jax import create_model, load_pretrained, save_pretrained
from cait_jax.cli import main, report
from cait_jax.explain.report import look as look_module

CLASSES = [f"class {i}" for i in range(5)]


def cait_report(*arguments, status=0):
    """Standard output and standard error."""
    result = CliRunner().invoke(main, ["report", *map(str, arguments)], prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Directories of a CaiT, a ViT with the mean of patches, one without a head, and a RegNetY."""
    root = tmp_path_factory.mktemp("models")
    settings = {
        "image_size": [32, 32], "crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.2] * 3, "channels": 3,
    }  # fmt: skip
    tiny = {"width": 16, "depth": 2, "num_heads": 2, "image_size": 32, "num_classes": 5}
    for folder, name, attributes in (
        ("cait", "cait_xxs24", tiny),
        ("mean", "vit_tiny", tiny | {"class_token": "mean"}),
        ("headless", "vit_tiny", tiny | {"num_classes": 0}),
        (
            "regnet",
            "regnety_160",
            {"image_size": 32, "num_classes": 5, "w0": 8, "depth": 4, "group_width": 8},
        ),
    ):
        model = create_model(name, **attributes)
        names = CLASSES if model.num_classes else None
        save_pretrained(root / folder, model, {"params": random_params(model)} if "regnet" not in folder else
                        jax.jit(model.init)(jax.random.key(0), np.zeros((1, 32, 32, 3), np.float32)),
                        label_names=names, preprocessing=settings)  # fmt: skip
    return root


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for name, size in (("a", 40), ("b", 40), ("c", 40), ("dot", 1)):
        pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}.png")
    (folder / "broken.png").write_bytes(b"nothing of the kind")
    return folder


def manifest_of(path):
    page = path.read_text(encoding="utf-8")
    return json.loads(re.search('id="manifest">(.*?)</script>', page)[1])


@pytest.mark.slow
def test_a_report_of_two_models_and_two_images(models, pictures, tmp_path):
    output = tmp_path / "report.html"
    given = [pictures / name for name in ("a.png", "broken.png", "b.png", "dot.png")]
    out, err = cait_report(
        *given, "--model", models / "cait", "-m", models / "headless", "-o", output, status=1
    )
    assert re.fullmatch(rf"{re.escape(str(output))}: 0\.\d MB, 2 images\n", out)
    assert "broken.png" in err
    assert "dot.png is left out: its shorter side has 1 pixels, fewer than the 2 patches" in err
    assert "2 of 4 images were left out" in err
    manifest = manifest_of(output)
    assert [each["name"] for each in manifest["models"]] == ["cait", "headless"]
    shown = {(manifest["images"][view["image"]], view["model"]) for view in manifest["views"]}
    assert shown == {("a.png", 0), ("b.png", 0), ("a.png", 1), ("b.png", 1)}
    model, variables = load_pretrained(models / "cait")
    from cait_jax import preprocessing

    images = preprocessing(models / "cait")([given[0]])
    probabilities = np.asarray(jax.nn.softmax(model.apply(variables, images)))[0]
    first = manifest["views"][0]["classes"]
    assert [each["word"] for each in first] == [CLASSES[i] for i in np.argsort(-probabilities)]
    found = [each["probability"] for each in first]
    np.testing.assert_allclose(found, np.sort(probabilities)[::-1], rtol=1e-4)
    assert manifest["views"][1]["classes"] == []  # of the network without a head


@pytest.mark.slow
def test_classes_the_small_form_and_chosen_images(models, pictures, tmp_path, monkeypatch):
    output = tmp_path / "report.html"
    given = [pictures / f"{name}.png" for name in "abc"]
    options = [
        "-m",
        models / "cait",
        "-o",
        output,
        "--top",
        "1",
        "--class",
        "4",
        "--class",
        "class 2",
    ]
    cait_report(*given, *options, "--self-attention", given[1])
    manifest = manifest_of(output)
    kept = {view["image"]: view["selfAttention"] for view in manifest["views"]}
    assert kept == {0: False, 1: True, 2: False}
    assert {2, 4} <= {each["index"] for each in manifest["views"][0]["classes"]}
    cait_report(*given, *options, "--small")
    manifest = manifest_of(output)
    assert manifest["headMeans"]
    assert all(view["selfAttention"] for view in manifest["views"])


def test_beyond_the_limit_the_first_images_keep_their_self_attention(models, pictures, monkeypatch):
    from cait_jax.cli.common import load_model

    loaded = load_model(str(models / "cait"), weights=None, image_size=None)
    each = look_module.self_attention_values(loaded.model, head_means=False)
    paths = [pictures / f"{name}.png" for name in "abc"]
    keep = report.images_with_self_attention
    assert keep([loaded], paths, (), small=False) == paths
    monkeypatch.setattr(report, "KEPT", 2 * each)
    assert keep([loaded], paths, (), small=False) == paths[:2]
    assert keep([loaded], paths, (), small=True) == paths
    assert keep([loaded], paths, paths[2:], small=False) == paths[2:]
    monkeypatch.setattr(report, "KEPT", each // 2)
    assert keep([loaded], paths, (), small=False) == paths[:1]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["a.png", "-m", "regnet"], "regnet is a RegNetY, a convolutional network without attention"),
        (["a.png", "-m", "mean"], "mean has no class token"),
        (["a.png", "-m", "cait", "--class", "clas 3"], "--class: there is no class 'clas 3'; nearest: class 3"),
        (["a.png", "-m", "headless", "--class", "3"], "leave out --class"),
        (["dot.png", "-m", "cait"], "every image is left out: give larger ones, or a smaller --image-size"),
        (["a.png", "-m", "cait", "--image-size", "8"], "--image-size 8"),
        (["a.png", "-m", "cait", "-m", "cait", "-m", "mean"], "--model is given 3 times: give it once or twice"),
        (["a.png", "-m", "cait", "-m", "mean", "--weights", "x"], "could be of either --model"),
        (["a.png", "-m", "cait", "--self-attention", "b.png"], "--self-attention b.png is none of the images"),
        (["a.png", "-m", "cait", "-o", "nowhere/report.html"], "there is no directory nowhere"),
        (["a.png"], "Missing option '--model'"),
    ],
)  # fmt: skip
def test_mistakes_are_sentences_before_anything_is_compiled(
    models, pictures, monkeypatch, arguments, sentence
):
    def compiled(*_, **__):
        raise AssertionError("a network was applied")

    monkeypatch.setattr(look_module, "look", compiled)
    monkeypatch.chdir(pictures)
    given = [models / a if (models / a).is_dir() else a for a in arguments]
    _, err = cait_report(*given, status=2 if "Missing" in sentence else 1)
    assert sentence in err.replace(f"{models}/", "")


def test_more_than_browsers_hold_is_refused(models, pictures, monkeypatch):
    monkeypatch.setattr(report, "MOST", 100)
    _, err = cait_report(pictures / "a.png", "-m", models / "cait", "-m", models / "cait", status=1)
    assert "choose --small, a smaller --image-size, or one --model" in err
