"""What `cait evaluate` says of which classes compete and how they were matched; networks without a head."""

import json

import numpy as np
import pytest
from test_commands import cait, probabilities

from cait_jax import load_pretrained, preprocessing, save_pretrained
from cait_jax.evaluation import knn_accuracy

SETTINGS = {
    "image_size": [8, 8], "crop_pct": 0.9, "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "channels": 3
}  # fmt: skip


@pytest.fixture(scope="module")
def images(photographs):
    """Of the fixture the pictures that can be read."""
    return sorted(photographs.rglob("[0-9].png"))


@pytest.fixture(scope="module")
def nameless(network, tmp_path_factory):
    directory = tmp_path_factory.mktemp("nameless") / "m"
    save_pretrained(directory, *network, preprocessing=SETTINGS)
    return directory


@pytest.fixture(scope="module")
def headless(network, tmp_path_factory):
    """The same network without its head."""
    model, variables = network
    directory = tmp_path_factory.mktemp("headless") / "m"
    body = {"params": {k: v for k, v in variables["params"].items() if k != "head"}}
    save_pretrained(directory, model.clone(num_classes=0), body, preprocessing=SETTINGS)
    return directory


def sort_images(root, images, names):
    """Pictures in `root/NAME`, by a name for each."""
    for path, name in zip(images, names, strict=True):
        (root / name).mkdir(parents=True, exist_ok=True)
        (root / name / path.name).write_bytes(path.read_bytes())
    return root


def predicted(saved, images):
    return [int(probabilities(saved, path).argmax()) for path in images]


@pytest.mark.slow
def test_a_model_without_names_needs_them_or_the_order(nameless, saved, images, tmp_path):
    """Folders are named so that every answer is right; as text they are in another order than the classes."""
    names = ("zebra", "ant", "bee")
    data = sort_images(tmp_path / "d", images, [names[i] for i in predicted(saved, images)])
    folders = sorted(path.name for path in data.iterdir())
    arguments = ["evaluate", "-m", nameless, "--data", data, "--json", "--rule", "all"]
    _, err = cait(*arguments, status=1)
    assert "--class-names FILE" in err
    assert ("--by-position if" in err) == (len(folders) == 3)
    for text in ("\ufeff" + "\r\n".join(names), json.dumps(names),
                 json.dumps({"id2label": dict(enumerate(names))}),
                 json.dumps({name: i for i, name in enumerate(names)})):  # fmt: skip
        (tmp_path / "names").write_text(text, encoding="utf-8")
        found = json.loads(cait(*arguments, "--class-names", tmp_path / "names")[0])
        assert (found["top1"], found["matched"]) == (1.0, "name")
    out, _ = cait(
        "predict", images[0], "-m", nameless, "--class-names", tmp_path / "names", "--json"
    )
    best = json.loads(out)["predictions"][0]
    assert best["label"] == names[best["class"]]


def test_by_position_says_the_order(nameless, images, tmp_path):
    data = sort_images(tmp_path / "d", images, ["10", "9", "\u00e9\x1b"] * 2 + ["10"])
    arguments = ["evaluate", "-m", nameless, "--data", data, "--by-position"]
    out, _ = cait(*arguments)
    assert "matched by position, not by name: '10' is 0, '9' is 1" in out
    assert "\x1b" not in out
    found = json.loads(cait(*arguments, "--json")[0])
    assert (found["matched"], found["data_names"][:2]) == ("position", ["10", "9"])
    few = sort_images(tmp_path / "few", images, ["a", "b"] * 3 + ["a"])
    _, err = cait("evaluate", "-m", nameless, "--data", few, "--by-position", status=1)
    assert "has 2 classes and the model 3" in err


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("a\nb", "has 2 class names and the model 3 classes: give --class-names a file"),
        ("a\n\nb", "class 2 has no name"),
        ('["a", 1, "b"]', "class 2 has no name"),
        ('{"a": 0, "b": 2, "c": 3}', "does not number its 3 names from 0 on"),
        ("[1", "is broken JSON"),
        (b"\xff", "is not UTF-8"),
        (None, "cannot be read: No such file"),
    ],
)
def test_files_of_names_that_do_not_do(saved, images, tmp_path, text, sentence):
    if text is not None:
        (tmp_path / "n").write_bytes(text if isinstance(text, bytes) else text.encode())
    _, err = cait("predict", images[0], "-m", saved, "--class-names", tmp_path / "n", status=1)
    assert sentence in err


@pytest.mark.slow
def test_how_many_classes_compete_is_said(saved, images, tmp_path):
    two = sort_images(tmp_path / "two", images, ["teapot", "sparrow"] * 3 + ["teapot"])
    out, _ = cait("evaluate", "-m", saved, "--data", two)
    assert "only 2 of the model's 3 classes compete" in out
    assert "top-5" not in out
    found = json.loads(cait("evaluate", "-m", saved, "--data", two, "--json")[0])
    assert (found["competing"], found["classes"], found["top5"]) == (2, 3, None)
    found = json.loads(cait("evaluate", "-m", saved, "--data", two, "--json", "--rule", "all")[0])
    assert (found["competing"], found["classes"]) == (3, 3)
    truth = [2, 1] * 3 + [2]
    assert found["top1"] == np.mean(np.array(predicted(saved, images)) == truth)

    one = sort_images(tmp_path / "one", images, ["sparrow"] * 7)
    out, err = cait("evaluate", "-m", saved, "--data", one, status=1)
    assert out == ""
    assert "one of the model's 3 classes, 'sparrow'" in err
    assert "with --rule all" in err
    out, _ = cait("evaluate", "-m", saved, "--data", one, "--rule", "all")
    assert "all 3 classes of the model compete" in out


def divided(root, images):
    """`train` and `test`, whose classes are of other numbers: test lacks the first."""
    names = ["ant", "bee", "cow"]
    sort_images(root / "train", images[:6], [names[i % 3] for i in range(6)])
    sort_images(root / "test", images[1:3] + images[6:], ["bee", "cow", "bee"])
    return root


def features_of(directory, paths):
    model, variables = load_pretrained(directory)
    return np.asarray(model.apply(variables, preprocessing(directory)(paths)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers")
def test_features_of_a_network_without_a_head_are_measured(headless, images, tmp_path):
    data = divided(tmp_path / "d", images)
    arguments = ["evaluate", "-m", headless, "--data", data, "--knn", "--probe"]
    found = json.loads(cait(*arguments, "--json")[0])
    assert not {"top1", "confusion", "loss"} & set(found)
    assert (found["knn_k"], found["counted"]) == (6, 3)
    bank = features_of(headless, images[:6])
    queries = features_of(headless, [images[1], images[2], images[6]])
    expected = knn_accuracy(
        bank, np.arange(6) % 3, queries, np.array([1, 2, 1]), k=6
    )  # fmt: skip
    assert found["knn"] == pytest.approx(expected)
    out, _ = cait(*arguments)
    assert "the model has no head" in out
    assert "k-NN (k=6)" in out
    assert "top-1" not in out


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ([], "measure its features with --knn or --probe"),
        (["--knn", "--confusion", "c.png"], "--confusion needs a head"),
        (["--probe", "--rule", "all"], "--rule needs a head"),
    ],
)
def test_what_needs_a_head_is_refused_without_one(headless, images, tmp_path, options, sentence):
    data = divided(tmp_path / "d", images)
    assert sentence in cait("evaluate", "-m", headless, "--data", data, *options, status=1)[1]


def test_a_picture_of_another_kind_is_refused_before_the_evaluation(saved, images):
    arguments = ["evaluate", "-m", saved, "--data", images[0].parent, "--confusion", "c.gif"]
    assert "c.gif must end in .png, .svg or .pdf" in cait(*arguments, status=1)[1]


@pytest.mark.slow
def test_weights_without_a_head_do_for_features(saved, headless, images, tmp_path):
    weights = ["--weights", headless / "model.safetensors"]
    targets = []
    for number, model in enumerate(([saved], [headless], [saved, *weights])):
        targets.append(tmp_path / f"{number}.npz")
        cait("features", *images[:2], "-m", *model, "-o", targets[-1])
    expected = features_of(headless, images[:2])
    for target in targets:
        with np.load(target) as file:
            np.testing.assert_allclose(file["features"], expected, rtol=1e-4, atol=1e-4)
    data = divided(tmp_path / "d", images)
    out, err = cait("evaluate", "-m", saved, *weights, "--data", data, "--knn")
    assert "only --knn and --probe are measured" in err
    assert "top-1" not in out
    assert "no head" in cait("evaluate", "-m", saved, *weights, "--data", data, status=1)[1]


def test_nothing_is_measured_on_what_was_learnt(saved, images, tmp_path):
    names = ["sparrow", "teapot"] * 3 + ["sparrow"]
    data = sort_images(tmp_path / "d", images, names)
    _, err = cait("evaluate", "-m", saved, "--data", data, "--knn", status=1)
    assert "learn from split 'train', which shares images with split 'all'" in err


@pytest.mark.slow
def test_train_and_test_splits_are_matched_by_name(headless, images, tmp_path):
    """Without `train` each split has its own classes: `val` a, b, c and `test` b, c."""
    data = divided(tmp_path / "d", images)
    (data / "train").rename(data / "val")
    arguments = [
        "evaluate",
        "-m",
        headless,
        "--data",
        data,
        "--knn",
        "--train-split",
        "val",
        "--json",
    ]
    found = json.loads(cait(*arguments)[0])
    bank = features_of(headless, images[:6])
    queries = features_of(headless, [images[1], images[2], images[6]])
    assert found["knn"] == knn_accuracy(bank, np.arange(6) % 3, queries, np.array([1, 2, 1]), k=6)
    (data / "test" / "cow").rename(data / "test" / "yak")
    assert "cannot be found in the split to learn from: yak" in cait(*arguments, status=1)[1]
    arguments[arguments.index("val")] = "train"
    assert "learn from --train-split train: folder " in cait(*arguments, status=1)[1]


@pytest.mark.slow
def test_what_is_left_out_is_said_by_every_command(saved, images, tmp_path):
    data = sort_images(tmp_path / "d", images, ["sparrow", "teapot"] * 3 + ["sparrow"])
    for i in range(9):
        (data / "teapot" / f"{i}.HEIC").write_bytes(b"ftypheic")
    for arguments in (
        ["evaluate", "-m", saved, "--data", data],
        ["predict", data, "-m", saved],
        ["features", data, "-m", saved, "-o", tmp_path / "f.npz"],
        ["data", "show", data],
    ):
        assert f"left out of {data}: 9 files (9 .heic" in cait(*arguments)[1]
    found = json.loads(cait("data", "show", data, "--json")[0])
    assert found["splits"][0]["left_out"] == {".heic": 9}


def test_recorded_logits_know_their_classes(saved, images, tmp_path):
    data = sort_images(tmp_path / "d", images, ["sparrow", "teapot"] * 3 + ["sparrow"])
    cait("evaluate", "-m", saved, "--data", data, "--logits", tmp_path / "l.npz")
    with np.load(tmp_path / "l.npz") as file:
        assert file["class_names"].tolist() == ["n01440764", "sparrow", "teapot"]
