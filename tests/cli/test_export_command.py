"""`cait export` as a user runs it."""

import json

import numpy as np
import pytest
from test_commands import cait

from cait_jax import load_pretrained, preprocessing
from cait_jax.export import environment, stablehlo
from cait_jax.export.stablehlo import load_exported


@pytest.mark.slow
def test_stablehlo_is_compared_on_photographs(saved, photographs, tmp_path):
    pytest.importorskip("flatbuffers", reason="JAX serialises programs by flatbuffers")
    image = photographs / "sparrow" / "1.png"
    target = tmp_path / "deep" / "exported"
    out, _ = cait("export", "-m", saved, "--to", "stablehlo", target, "--images", image, "--uint8")
    assert "2 images of noise and 1 photograph:" in out
    assert "cpu: differs by at most " in out
    assert "tpu: not run (JAX finds no tpu device here)" in out
    described = json.loads((target / "export.json").read_text())
    assert described["label_names"] == ["n01440764", "sparrow", "teapot"]
    assert described["class_words"][0] == "tench, Tinca tinca"
    model, variables = load_pretrained(saved)
    prepare = preprocessing(saved)
    (logits,) = load_exported(target)(prepare.crops(image))
    expected = model.apply(variables, prepare(image))
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--images", "nowhere.jpg"], "nowhere.jpg"),
        (
            ["--to", "stablehlo", "--class-names", "nowhere.txt"],
            "--class-names nowhere.txt cannot be read",
        ),
    ],
)
def test_mistakes_are_sentences_before_anything_is_compiled(
    saved, tmp_path, monkeypatch, arguments, sentence
):
    monkeypatch.setattr(stablehlo, "export_stablehlo", None)
    target = tmp_path / "exported"
    _, err = cait("export", "-m", saved, "--to", "stablehlo", target, *arguments, status=1)
    assert sentence in err.splitlines()[-1]
    assert not target.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--to", "onnx"], "give --environment DIR, and --install to make it there"),
        (["--to", "onnx", "--environment", "nowhere"], "in nowhere: add --install to make it"),
        (["--to", "onnx", "--dtype", "bfloat16"], "leave out --dtype bfloat16"),
        (["--to", "stablehlo", "--int8"], "--int8 goes with --to onnx and web"),
        (["--to", "web", "--attention"], "--attention goes with --to stablehlo and onnx"),
    ],
)
def test_what_a_format_needs_is_asked_for_before_the_model_is_read(tmp_path, arguments, sentence):
    _, err = cait("export", "-m", tmp_path / "no", tmp_path / "exported", *arguments, status=1)
    assert sentence in err.splitlines()[-1]


def test_a_page_asks_for_its_runtime(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "environment_python", lambda *_, **__: None)
    arguments = ["-m", tmp_path / "no", "--to", "web", tmp_path / "page"]
    _, err = cait("export", *arguments, status=1)
    assert "give --runtime DIR, a folder that has it, or --download-runtime" in err
    _, err = cait("export", *arguments, "--runtime", tmp_path, status=1)
    assert "has no ort.wasm.min.js" in err


def test_a_target_that_is_a_file_is_refused(saved, tmp_path):
    (tmp_path / "file").write_text("")
    _, err = cait("export", "-m", saved, "--to", "stablehlo", tmp_path / "file", status=2)
    assert "is a file" in err
