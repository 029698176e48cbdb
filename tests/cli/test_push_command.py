"""`cait push` to a server on this machine that answers as the hub does, and models loaded from there again."""

import io
import json
import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import ORGANISATION, TOKEN, USER, point_at, serve_hub
from PIL import Image
from small_runs import save_run
from trees import assert_same_bits, random_params

from cait_jax import (
    Preprocessing,
    create_model,
    load_pretrained,
    load_settings,
    preprocessing,
    save_pretrained,
)
from cait_jax.cli import main, push
from cait_jax.weights import runs

# Of huggingface_hub's own request.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

DIGITS = create_model("cait_nano4_patch4_8", num_classes=10, in_channels=1)
NAMED = {"class_names": [f"digit {i}" for i in range(10)], "channels": 1}
METRICS = {
    "eval/accuracy": 0.875,
    "eval/loss": 0.5,
    "eval/ema_accuracy": 0.9,
    "eval/nan": float("nan"),
}
NAME = f"{USER}/digits"
FILES = {"README.md", "class_attention.png", "config.json", "model.safetensors", "training.json"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("runs") / "digits"
    save_run(workdir, DIGITS, steps=(1, 2), ema=True, metrics=METRICS, **NAMED)
    return workdir


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serve_hub({}) as server:
        point_at(monkeypatch, server.server_port, tmp_path / "cache")
        yield server


def cait_push(*arguments, status=0, **options):
    """Standard output and the last line of standard error of `cait push`."""
    words = ["push", *(str(each) for each in arguments)]
    result = CliRunner().invoke(main, words, prog_name="cait", **options)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    assert "Traceback" not in result.output
    return result.stdout, ["", *result.stderr.strip().splitlines()][-1]


def metadata(card):
    from huggingface_hub import ModelCard

    return ModelCard(card.decode()).data


def test_what_is_pushed_is_loaded_again_with_the_same_logits(hub, run):
    out, _ = cait_push(run, NAME, "--yes", "--license", "mit", "--dataset", "lab/digits")
    assert "private, a new repository" in out
    assert hub.private == {NAME}
    assert {*hub.files[NAME]} - {".gitattributes"} == FILES
    address = f"hf://{NAME}@{hub.commits[NAME]}"
    assert address in out

    model, variables = load_pretrained(address)
    trained, trained_variables = load_pretrained(run)
    assert model == trained
    assert_same_bits(variables, trained_variables)
    images = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    found, expected = (
        jax.jit(network.apply)(values, images)
        for network, values in ((model, variables), (trained, trained_variables))
    )
    np.testing.assert_array_equal(found, expected)
    assert load_settings(address) == load_settings(run)
    assert preprocessing(f"hf://{NAME}") == preprocessing(run)


def test_the_card_says_what_the_run_recorded(hub, run):
    cait_push(run, NAME, "--yes", "--license", "mit", "--dataset", "lab/digits")
    files = hub.files[NAME]
    card = files["README.md"].decode()
    data = metadata(files["README.md"])
    assert (data.license, data.library_name, data.datasets) == ("mit", "timm", ["lab/digits"])
    assert data.pipeline_tag == "image-classification"
    assert data.metrics == ["accuracy"]
    (result,) = data.eval_results
    assert (result.metric_value, result.dataset_split) == (0.875, "test")
    assert "| accuracy | 87.50% |\n| loss | 0.5 |" in card
    assert "nan" not in card
    assert "averaged" not in card
    assert "digit 0, digit 1" in card
    assert "after step 2" in card
    assert f'load_pretrained("hf://{NAME}")' in card
    assert f'timm.create_model("hf-hub:{NAME}"' in card
    assert "(class_attention.png)" in card
    with Image.open(io.BytesIO(files["class_attention.png"])) as picture:
        assert picture.width > picture.height > 300  # two blocks, four heads
    assert json.loads(files["training.json"])["optimizer"]["ema_decay"] == 0.99


def test_the_average_and_one_checkpoint(hub, run):
    cait_push(run / "checkpoints" / "1", NAME, "--yes", "--ema", "--no-image", "--public")
    assert hub.private == set()
    assert "class_attention.png" not in hub.files[NAME]
    _, variables = load_pretrained(f"hf://{NAME}")
    assert_same_bits(variables, {"params": random_params(DIGITS, seed=101)})
    card = hub.files[NAME]["README.md"].decode()
    assert "| accuracy of averaged parameters | 90.00% |" in card
    assert "87.50%" not in card
    assert metadata(hub.files[NAME]["README.md"]).eval_results[0].metric_value == 0.9


def test_a_saved_model_has_the_picture_of_a_photograph(hub, saved, photographs):
    image = photographs / "sparrow" / "1.png"
    cait_push(saved, f"{ORGANISATION}/birds", "--yes", "--image", image)
    files = hub.files[f"{ORGANISATION}/birds"]
    assert {*files} - {".gitattributes"} == FILES - {"training.json"}
    data = metadata(files["README.md"])
    assert data.eval_results is data.license is data.datasets is None
    assert b"Trained" not in files["README.md"]
    _, variables = load_pretrained(f"hf://{ORGANISATION}/birds")
    assert_same_bits(variables, load_pretrained(saved)[1])


def test_without_a_picture_the_rest_is_uploaded_and_a_note_says_why(hub, saved):
    result = CliRunner().invoke(main, ["push", str(saved), NAME, "--yes"])
    assert (
        "no picture: a saved model has no images of its own; give one by --image" in result.stderr
    )
    assert {*hub.files[NAME]} - {".gitattributes"} == FILES - {
        "training.json",
        "class_attention.png",
    }
    assert "class_attention" not in hub.files[NAME]["README.md"].decode()


@pytest.mark.parametrize(
    ("attributes", "library", "task"),
    [
        ({"num_classes": 0}, "timm", "image-feature-extraction"),
        ({"class_token": "mean", "class_depth": 0}, "cait-jax", "image-classification"),
    ],
)
def test_other_networks(hub, photographs, tmp_path, attributes, library, task):
    model = create_model(
        "cait_nano4_patch4_8", in_channels=3, depth=1, **{"num_classes": 2} | attributes
    )
    names = ["a|b", "c_d*e"] if model.num_classes else None
    prepare = Preprocessing((8, 8))
    variables = {"params": random_params(model)}
    save_pretrained(tmp_path / "saved", model, variables, label_names=names, preprocessing=prepare)
    image = "--image", photographs / "sparrow" / "1.png"
    if "class_token" in attributes:  # there is nothing to draw
        _, last = cait_push(tmp_path / "saved", NAME, "--yes", *image, status=1)
        assert "has no class token" in last
        assert last.endswith(": leave out --image")
        image = ()
    cait_push(tmp_path / "saved", NAME, "--yes", *image)
    files = hub.files[NAME]
    assert ("class_attention.png" in files) == bool(image)
    data = metadata(files["README.md"])
    assert (data.library_name, data.pipeline_tag) == (library, task)
    assert (b"timm" in files["README.md"]) == (library == "timm")
    assert (rb"a\|b, c\_d\*e" in files["README.md"]) == bool(names)
    assert_same_bits(load_pretrained(f"hf://{NAME}")[1], variables)


def test_places_of_files_stay_at_home(hub, run, tmp_path, monkeypatch):
    found = runs.run_checkpoint(run)
    found.config["data"]["name"] = str(tmp_path / "my pictures")
    found.config["init"]["weights"] = "~/secret/weights"
    monkeypatch.setattr(runs, "run_checkpoint", lambda path: found)
    cait_push(run, NAME, "--yes")
    text = b"".join(hub.files[NAME][name] for name in FILES - {"class_attention.png"})
    assert str(tmp_path).encode() not in text
    assert b"secret" not in text
    assert json.loads(hub.files[NAME]["training.json"])["data"]["name"] == "my pictures"
    assert metadata(hub.files[NAME]["README.md"]).eval_results[0].dataset_type == "imagefolder"


# Asking


def test_nothing_is_uploaded_before_the_answer(hub, run, monkeypatch):
    monkeypatch.setattr(push, "_can_ask", lambda: True)
    out, last = cait_push(run, NAME, "--no-image", input="n\n", status=1)
    assert last == "cait: nothing was uploaded"
    for name in FILES - {"class_attention.png"}:
        assert name in out
    assert "private" in out
    assert hub.files == {}
    assert {method for method, _ in hub.requests} == {"GET"}
    cait_push(run, NAME, "--no-image", input="y\n")
    assert NAME in hub.files


def test_without_a_terminal_nobody_is_asked(hub, run):
    _, last = cait_push(run, NAME, status=1)
    assert last == "Error: there is no terminal to ask at: add --yes to upload without being asked"
    assert hub.requests == []


# Again, and what breaks off


@pytest.mark.parametrize(
    "fault",
    [
        ("POST", "/preupload/", 0),
        ("POST", "/info/lfs/", 503),
        ("PUT", "/lfs/", 500),
        ("PUT", "/lfs/", 0),
        ("POST", "/commit/", 0),
        ("POST", "/commit/", 500),
    ],
)
def test_an_interrupted_push_is_completed_by_the_same_command(hub, run, fault):
    hub.fault = fault
    _, last = cait_push(run, NAME, "--yes", "--no-image", status=1)
    assert "run the same command again" in last
    assert {*hub.files[NAME]} == {".gitattributes"}  # nobody loads half of it
    sent = len(hub.blobs)
    hub.fault = None
    hub.requests.clear()
    cait_push(run, NAME, "--yes", "--no-image")
    assert sum(method == "PUT" for method, _ in hub.requests) == 1 - sent
    assert_same_bits(load_pretrained(f"hf://{NAME}")[1], load_pretrained(run)[1])


@pytest.mark.slow
@pytest.mark.parametrize("blocked", ["/lfs/", "/commit/"])
def test_a_push_that_was_killed_is_completed_by_the_same_command(hub, run, blocked, tmp_path):
    hub.fault = ("PUT" if blocked == "/lfs/" else "POST", blocked, None)
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HUB_DISABLE_XET": "1",
        "TMPDIR": str(tmp_path),  # the files of a killed process stay
    }
    command = [sys.executable, "-m", "cait_jax", "push", str(run), NAME, "--yes", "--no-image"]
    with subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL) as process:
        end = time.monotonic() + 120
        while not any(blocked in path for _, path in hub.requests) and time.monotonic() < end:
            time.sleep(0.05)
        assert process.poll() is None
        process.kill()
    assert {*hub.files[NAME]} == {".gitattributes"}
    hub.fault = None
    cait_push(run, NAME, "--yes", "--no-image")
    assert_same_bits(load_pretrained(f"hf://{NAME}")[1], load_pretrained(run)[1])


def test_the_same_again_sends_nothing_and_another_step_replaces(hub, run):
    cait_push(run, NAME, "--yes")
    commit = hub.commits[NAME]
    hub.requests.clear()
    out, _ = cait_push(run, NAME, "--yes")
    assert "had all of this already" in out
    assert not [path for method, path in hub.requests if method == "PUT" or "/commit/" in path]
    out, _ = cait_push(run / "checkpoints" / "1", NAME, "--yes")
    assert "replaced" in out
    assert hub.commits[NAME] != commit
    _, variables = load_pretrained(f"hf://{NAME}")
    assert_same_bits(variables, {"params": random_params(DIGITS, seed=1)})


# Refusals, each before anything is read of the weights


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.parametrize(
    ("repository", "options", "sentence"),
    [
        ("digits", (), "'digits' is no repository of the hub: give NAMESPACE/NAME"),
        (f"hf://{NAME}", (), "is no repository of the hub"),
        ("else/digits", (), f"push to {USER}/NAME or to an organisation of it ({ORGANISATION})"),
        (f"{USER}/public", (), "is on the hub already and public: add --public"),
        (f"{USER}/private", ("--public",), "already and private: leave out --public"),
        (f"{USER}/other", (), "holds no model of this package: choose another name"),
        (f"{USER}/timm", (), "holds no model of this package: choose another name"),
        (NAME, ("--image", "x.png", "--no-image"), "exclude each other"),
        (NAME, ("--image", "none.png"), "--image none.png cannot be read: No such file"),
    ],
)
def test_a_target_that_is_refused(hub, run, repository, options, sentence):
    ours = {"config.json": b'{"cait_jax": {}}', "model.safetensors": b""}
    hub.files[f"{USER}/public"] = ours
    hub.files[f"{USER}/private"] = ours
    hub.private.add(f"{USER}/private")
    hub.files[f"{USER}/other"] = {"pytorch_model.bin": b""}
    hub.files[f"{USER}/timm"] = {"config.json": b"{}", "model.safetensors": b""}
    _, last = cait_push(run, repository, "--yes", *options, status=1)
    assert sentence in last
    assert {method for method, _ in hub.requests} <= {"GET", "HEAD"}


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (("GET", "/whoami", 503), "refused (HTTP 503): run the same command again later"),
        (("POST", "/create", 403), "cannot be made: the hub at"),
        (("POST", "/create", 409), "something of this name"),
        (("POST", "/commit/", 403), "refused (HTTP 403): log in by `hf auth login`, with a token that"),
        (("POST", "/commit/", 412), "it was changed meanwhile; run the same command again"),
    ],
)  # fmt: skip
def test_a_hub_that_refuses(hub, run, fault, sentence):
    hub.fault = fault
    _, last = cait_push(run, NAME, "--yes", "--no-image", status=1)
    assert sentence in last


def test_a_login_is_needed(hub, run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert "does not know the token of this login" in cait_push(run, NAME, "--yes", status=1)[1]
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    _, last = cait_push(run, NAME, "--yes", status=1)
    assert last.startswith("Error: nobody is logged in to the hub at http")
    assert "`hf auth login`" in last


def test_a_hub_that_cannot_be_reached(hub, run, tmp_path, monkeypatch):
    from huggingface_hub import constants

    point_at(monkeypatch, free_port(), tmp_path / "cache")
    assert "cannot be reached" in cait_push(run, NAME, "--yes", status=1)[1]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    _, last = cait_push(run, NAME, "--yes", status=1)
    assert last == "Error: HF_HUB_OFFLINE forbids uploads: unset it"


def test_what_is_neither_a_run_nor_a_saved_model(hub, tmp_path):
    _, last = cait_push(tmp_path, NAME, "--yes", status=1)
    assert "is neither a training run nor a saved model" in last
    (tmp_path / "checkpoints").mkdir()
    _, last = cait_push(tmp_path, NAME, "--yes", status=1)
    assert "has saved no checkpoint yet" in last
