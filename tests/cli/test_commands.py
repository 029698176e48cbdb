"""Every command of `cait`, run as a user would, against the same done in Python."""

import csv
import io
import json
import subprocess
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from marks import slow

from cait_jax import (
    create_model,
    forward_intermediates,
    list_models,
    load_pretrained,
    preprocessing,
    save_pretrained,
)
from cait_jax.cli import COMMANDS, main
from cait_jax.train.objectives.distillation import read_logits


def cait(*arguments, status=0):
    """Standard output and standard error of a command that ends with `status`."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.stdout, result.stderr


# The program


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command):
    out, _ = cait(command, "--help")
    assert f"Example: cait {command} " in " ".join(out.split())
    assert command in cait("--help")[0]


@pytest.mark.slow
def test_python_m_is_the_same_program_and_a_pipe_closed_early_is_no_traceback():
    result = subprocess.run(
        f"{sys.executable} -m cait_jax models 'cait_x*' | head -n 1",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.startswith("name")
    assert result.stderr == ""


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["evalute"], 2, "No such command 'evalute'"),
        (["models", "resnet*"], 1, "no model matches 'resnet*': `cait models` lists them all"),
        (["recipes", "x*"], 1, "no recipe matches 'x*': `cait recipes` lists them all"),
        (["predict", "a.jpg"], 2, "Missing option '--model'"),
        (["predict", "nowhere.jpg", "-m", "cait_s24_224"], 1, "nowhere.jpg"),
        (["convert", "-m", "cait_s48", "out"], 1, "no weights were released for cait_s48"),
        (["convert", "-m", "cait_xs24", "out"], 1, "the same architecture was as cait_xs24_384"),
        (["evaluate", "-m", "cait_s24", "--data", "digits", "-o", "no/x.json"], 1, "make it"),
    ],
)
def test_mistakes_are_sentences(arguments, status, sentence):
    _, err = cait(*arguments, status=status)
    assert sentence in err


# models


@pytest.mark.slow
def test_models_lists_the_zoo_with_what_each_costs():
    rows = json.loads(cait("models", "--json")[0])
    assert [row["name"] for row in rows] == list_models()
    xs24 = next(row for row in rows if row["name"] == "cait_xs24_384")
    assert xs24["parameters"] == 26_670_088
    assert xs24["gmacs"] == pytest.approx(19.28, rel=0.005)
    assert (xs24["image_size"], xs24["top1"]) == ([384, 384], 84.064)
    assert xs24["weights"] == "timm/cait_xs24_384.fb_dist_in1k"
    assert all((row["top1"] is None) == (row["top1_source"] is None) for row in rows)


@pytest.mark.slow
def test_models_with_weights_are_the_released_ones():
    rows = json.loads(cait("models", "--pretrained", "--json")[0])
    assert [row["name"] for row in rows] == list_models(pretrained=True)
    # CaiT, DeiT, ViT (AugReg), DeiT III, DINO and MAE, DINOv2, the teacher
    assert len(rows) == 10 + 6 + 5 + 14 + 6 + 8 + 1
    for row in rows:
        assert row["weights"] == f"timm/{row['name']}" or row["weights"].startswith(
            f"timm/{row['name']}."
        )


def test_models_prints_a_table_and_a_markdown_one():
    plain, _ = cait("models", "cait_m48*")
    assert "356,460,520" in plain
    marked, _ = cait("models", "cait_m48*", "--markdown")
    assert "| `cait_m48_448` |" in marked


# predict


def probabilities(saved, path):
    model, variables = load_pretrained(saved)
    return jax.nn.softmax(model.apply(variables, preprocessing(saved)(path)))[0]


@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_predict_gives_the_models_own_probabilities(saved, photographs):
    out, err = cait(
        "predict", photographs, "-m", saved, "--json", "--top", 3, "--batch-size", 4, status=1
    )
    records = [json.loads(line) for line in out.splitlines()]
    assert len(records) == 8
    for record in records:
        if "error" in record:
            assert record["image"].endswith("broken.png")
            continue
        expected = probabilities(saved, record["image"])
        ranked = np.argsort(-expected)
        assert [p["class"] for p in record["predictions"]] == ranked.tolist()
        found = [p["probability"] for p in record["predictions"]]
        np.testing.assert_allclose(found, expected[ranked], atol=1e-5)
        names = {p["class"]: p["label"] for p in record["predictions"]}
        assert names == {0: "tench, Tinca tinca", 1: "sparrow", 2: "teapot"}
    assert "broken.png cannot be decoded" in err
    assert "1 of 8 images were left out" in err


def test_predict_writes_csv_and_text(saved, photographs, tmp_path):
    image = photographs / "sparrow" / "1.png"
    target = tmp_path / "out.csv"
    cait("predict", image, "-m", saved, "--csv", "--top", 2, "-o", target)
    rows = list(csv.DictReader(io.StringIO(target.read_text())))
    assert [row["rank"] for row in rows] == ["1", "2"]
    assert float(rows[0]["probability"]) >= float(rows[1]["probability"])
    text, err = cait("predict", image, "-m", saved, "--top", 1)
    assert text.splitlines()[0] == str(image)
    assert text.splitlines()[1].strip().endswith(rows[0]["label"])
    assert err == ""


def test_predict_takes_globs_and_another_resolution(saved, photographs):
    pattern = photographs / "*" / "[0-2].png"
    out, _ = cait("predict", pattern, "-m", saved, "--image-size", 12, "--json")
    assert [json.loads(line)["image"][-5:] for line in out.splitlines()] == [
        "0.png", "1.png", "2.png"
    ]  # fmt: skip


# evaluate


@pytest.mark.slow
def test_evaluate_scores_a_folder_exactly(saved, photographs, tmp_path):
    good = tmp_path / "good"
    for path in photographs.rglob("[0-9].png"):
        target = good / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    out, _ = cait(
        "evaluate", "-m", saved, "--data", good, "--json", "--batch-size", 3,
        "--confusion", tmp_path / "c.png", "-o", tmp_path / "scores.json",
        "--logits", tmp_path / "logits.npz",
    )  # fmt: skip
    result = json.loads(out)
    assert result == json.loads((tmp_path / "scores.json").read_text())
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")

    paths = sorted(good.rglob("*.png"))
    labels = ["n01440764", "sparrow", "teapot"]
    truth = [labels.index(path.parent.name) for path in paths]
    expected = np.stack([probabilities(saved, path) for path in paths])
    right = expected.argmax(-1) == truth
    assert result["counted"] == 7
    assert result["top1"] == right.mean()
    loss = -np.log(expected[np.arange(7), truth]).mean()
    assert result["loss"] == pytest.approx(loss, rel=1e-4)
    assert np.sum(result["confusion"]) == 7
    recorded = read_logits(tmp_path / "logits.npz", examples=7, num_classes=3)
    np.testing.assert_allclose(jax.nn.softmax(recorded), expected, atol=1e-5)
    text, _ = cait("evaluate", "-m", saved, "--data", good)
    assert f"{right.mean():.3%}" in text
    assert "tench" in text


def test_evaluate_names_the_broken_image(saved, photographs):
    _, err = cait("evaluate", "-m", saved, "--data", photographs, status=1)
    assert "broken.png" in err


# features


@pytest.mark.parametrize(
    ("layer", "tokens", "shape"),
    [
        ("head", False, (2, 64)),
        slow("blocks.0", True, (2, 4, 64)),
        slow("blocks_token_only.1", False, (2, 64)),
    ],
)
def test_features_are_those_of_the_layer(saved, photographs, tmp_path, layer, tokens, shape):
    target = tmp_path / "features.npz"
    images = [photographs / "sparrow" / "1.png", photographs / "teapot" / "2.png"]
    extra = ["--tokens"] if tokens else []
    cait("features", *images, "-m", saved, "--layer", layer, "-o", target, *extra)
    with np.load(target) as file:
        assert file["features"].shape == shape
        assert file["paths"].tolist() == [str(image) for image in images]
        found = file["features"]
    model, variables = load_pretrained(saved)
    _, inside = forward_intermediates(model, variables, preprocessing(saved)(images))
    stage, _, number = layer.partition(".")
    expected = inside["features"] if layer == "head" else inside[stage]["features"][int(number)]
    if expected.ndim == 3 and not tokens:
        expected = expected.mean(axis=1)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_features_name_the_layers_there_are(saved, photographs, tmp_path):
    image = photographs / "teapot" / "2.png"
    _, err = cait(
        "features", image, "-m", saved, "--layer", "blocks.1", "-o", tmp_path / "x.npz", status=1
    )
    assert "no layer 'blocks.1'; there are head, blocks.0 to blocks.0, blocks_token_only.0" in err
    assert not (tmp_path / "x.npz").exists()


# convert


def test_convert_writes_what_loads_to_the_same_bits(saved, tmp_path):
    cait("convert", "-m", saved, tmp_path / "again")
    cait("convert", "-m", saved, "--to", "timm", tmp_path / "timm")
    _, before = load_pretrained(saved)
    for directory in ("again", "timm"):
        model, after = load_pretrained(tmp_path / directory)
        assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
        assert model.num_classes == 3
        assert preprocessing(tmp_path / directory) == preprocessing(saved)
    assert "timm" in (tmp_path / "timm" / "README.md").read_text()


def test_convert_averages_models(saved, network, tmp_path):
    model, variables = network
    other = jax.tree.map(lambda leaf: 3 * leaf, variables)
    save_pretrained(tmp_path / "other", model, other)
    cait("convert", "-m", saved, "--average", tmp_path / "other", tmp_path / "mean")
    _, mean = load_pretrained(tmp_path / "mean")
    for a, b in zip(jax.tree.leaves(mean), jax.tree.leaves(variables), strict=True):
        np.testing.assert_allclose(a, 2 * b, rtol=1e-6)


def test_convert_averages_what_the_options_ask_for_of_each(saved, network, tmp_path):
    """At another resolution all are resized; of what has no moving average, that is said."""
    model, variables = network
    other = jax.tree.map(lambda leaf: 3 * leaf, variables)
    save_pretrained(tmp_path / "other", model, other)
    both = ("-m", saved, "--average", tmp_path / "other")
    cait("convert", *both, "--image-size", "16", tmp_path / "mean")
    mean = load_pretrained(tmp_path / "mean")[1]["params"]["pos_embed"]
    resized = load_pretrained(saved, image_size=16)[1]["params"]["pos_embed"]
    np.testing.assert_allclose(mean, 2 * resized, rtol=1e-5, atol=1e-7)
    _, err = cait("convert", *both, "--ema", tmp_path / "x", status=1)
    assert "has no average beside its weights: leave out --ema" in err


def test_weights_without_a_network_need_its_name(saved, tmp_path):
    _, err = cait("convert", "-m", saved / "model.safetensors", tmp_path / "x", status=1)
    assert f"give --model NAME and --weights {saved / 'model.safetensors'}" in err


def test_named_models_have_preprocessing_and_small_ones_say_why_not():
    assert preprocessing("cait_m48_448").image_size == (448, 448)
    assert preprocessing("deit_tiny_patch16_224").crop_pct == 0.9
    assert preprocessing("vit_base_patch16_224").mean == (0.5, 0.5, 0.5)
    assert preprocessing("cait_s48", image_size=384).image_size == (384, 384)
    with pytest.raises(ValueError, match="no preprocessing is known for cait_nano4_patch4_8"):
        preprocessing("cait_nano4_patch4_8")


def test_create_model_pretrained_gives_model_and_variables(network, tmp_path):
    model, variables = network
    save_pretrained(tmp_path / "s", model, variables)
    again, loaded = create_model(
        "cait_nano4_patch4_8", pretrained=True, weights=tmp_path / "s", depth=1, in_channels=3,
        num_classes=3,
    )  # fmt: skip
    assert again.depth == 1
    assert jax.tree.all(jax.tree.map(np.array_equal, variables, loaded))
