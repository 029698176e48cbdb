"""Saved models by their address on a server on this machine that answers as the hub does."""

from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import COMMIT, point_at, serve_hub
from PIL import Image
from small_runs import small_digits
from trees import random_params

from cait_jax import (
    UserError,
    create_model,
    load_pretrained,
    load_settings,
    preprocessing,
    save_pretrained,
)
from cait_jax.cli import main
from cait_jax.data.preprocess import Preprocessing
from cait_jax.train.config import check_values
from cait_jax.train.finetune import Photographs, folder_config
from cait_jax.weights import pretrained
from cait_jax.weights.hub_files import as_written, local

MODEL = create_model("cait_nano4_patch4_8", image_size=8, num_classes=2, in_channels=3)
NAME = "somebody/cats"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    variables = {"params": random_params(MODEL)}
    prepare = Preprocessing((8, 8))
    save_pretrained(
        tmp_path / "saved", MODEL, variables, label_names=["cat", "dog"], preprocessing=prepare
    )
    files = {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    with serve_hub({NAME: files}) as server:
        point_at(monkeypatch, server.server_port, tmp_path / "cache")
        server.variables = variables
        yield server


@pytest.mark.parametrize("address", [f"hf://{NAME}", f"hf://{NAME}@{COMMIT}"])
def test_a_saved_model_is_loaded_by_its_address(hub, address):
    model, variables = load_pretrained(address)
    assert model == MODEL
    jax.tree.map(np.testing.assert_array_equal, variables, hub.variables)
    assert load_settings(address).label_names == ("cat", "dog")
    assert preprocessing(address).image_size == (8, 8)


def test_what_is_saved_beside_the_weights_does_not_download_them(hub):
    assert pretrained.load_model(f"hf://{NAME}") == MODEL
    assert not [path for _, path in hub.requests if path.endswith("safetensors")]


def test_a_commit_is_not_asked_for_again(hub):
    load_pretrained(f"hf://{NAME}@{COMMIT}")
    hub.requests.clear()
    load_pretrained(f"hf://{NAME}@{COMMIT}")
    assert hub.requests == []


def test_weights_of_another_name(hub):
    _, variables = load_pretrained(
        "cait_nano4_patch4_8", weights=f"hf://{NAME}", image_size=8, num_classes=2, in_channels=3
    )
    jax.tree.map(np.testing.assert_array_equal, variables, hub.variables)


def test_a_command_takes_an_address_as_model_and_as_weights(hub, tmp_path):
    Image.new("RGB", (9, 9)).save(tmp_path / "dog.png")
    arguments = ["predict", str(tmp_path / "dog.png"), "--model"]
    result = CliRunner().invoke(main, [*arguments, f"hf://{NAME}"])
    assert result.exit_code == 0, result.output
    assert "cat" in result.stdout
    result = CliRunner().invoke(main, [*arguments, "cait_xxs24_224", "--weights", f"hf://{NAME}"])
    assert result.stderr.splitlines()[-1].startswith(f"Error: hf://{NAME}: ")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("hf://cats", r"hf://cats is no address of the hub: give hf://NAMESPACE/NAME"),
        ("hf://a/b/c", r"hf://a/b/c is no address"),
        ("hf://a/b@", r"is no address"),
        ("hf://../..", r"'\.\./\.\.' is no repository of the hub: give hf://NAMESPACE/NAME"),
        ("hf://some one/cats", r"'some one/cats' is no repository"),
        ("hf://somebody/none", r"refused config.json of somebody/none \(HTTP 404\)"),
        (f"hf://{NAME}@v2", r"refused config.json of somebody/cats \(HTTP 404\)"),
    ],
)
def test_an_address_that_is_none(hub, address, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        load_pretrained(address)
    assert "\n" not in str(caught.value)


def test_files_of_another_library(hub):
    hub.files["timm/cats"] = {"config.json": b'{"architecture": "cait"}', "model.safetensors": b""}
    with pytest.raises(UserError, match=r"config.json of hf://timm/cats is not of this package"):
        load_pretrained("hf://timm/cats")
    hub.files["timm/dogs"] = {"config.json": b"["}
    with pytest.raises(UserError, match=r"config.json of hf://timm/dogs cannot be read"):
        load_settings("hf://timm/dogs")


def test_weights_that_config_json_was_not_written_for(hub):
    hub.files[NAME]["model.safetensors"] = hub.files[NAME]["model.safetensors"][:-1] + b"\x01"
    with pytest.raises(UserError, match="its SHA-256 differs"):
        load_pretrained(f"hf://{NAME}")


def test_a_path_merges_slashes_and_is_written_with_both(hub, tmp_path):
    assert as_written(Path(f"hf://{NAME}")) == f"hf://{NAME}"
    assert local(Path(f"hf://{NAME}"), weights=False).name == COMMIT
    assert (local(tmp_path), as_written(tmp_path)) == (tmp_path, str(tmp_path))


def test_training_starts_from_an_address(hub):
    config = small_digits()
    config.init.weights = f"hf://{NAME}"
    with config.ignore_type():
        config.model = {"name": "cait_nano4_patch4_8"}
    params = pretrained.params_from_config(config, MODEL)
    jax.tree.map(np.testing.assert_array_equal, params, hub.variables["params"])


@pytest.mark.parametrize("weights", [None, Path(f"hf://{NAME}")])
def test_fine_tuning_starts_from_an_address(hub, weights):
    photographs = Photographs(Path("/photographs"), "val", 100, 20, ("a", "b"))
    model = f"hf://{NAME}" if weights is None else "cait_nano4_patch4_8"
    config = folder_config(photographs, model, weights=weights)
    assert config.init.weights == f"hf://{NAME}"
    assert config.image_size == 8
    check_values(config)
