"""The table of released weights, and downloads from a server on this machine that answers as the hub does."""

import dataclasses
import hashlib
import socket
import time

import numpy as np
import pytest
from click.testing import CliRunner
from hub_server import COMMIT, point_at, serve_hub

from cait_jax import UserError, create_model
from cait_jax.cli import main
from cait_jax.weights.hub import RELEASED, Result, download, find_released, published_result
from cait_jax.weights.pins import Pin, ask_for_pins, read_pins, write_pins
from cait_jax.weights.state_dicts import read_weights, write_safetensors


def test_every_row_is_a_model_at_its_own_resolution():
    assert len(RELEASED) == 50
    for name, row in RELEASED.items():
        assert (row.name, create_model(name).image_size) == (name, (row.image_size,) * 2)
        tagged = "." in name
        assert row.hub_id == f"timm/{name}" if tagged else row.hub_id.startswith(f"timm/{name}.")
        assert bool(row.source) == (row.top1 is not None)
        assert row.preprocessing()["image_size"] == [row.image_size] * 2


def test_evaluation_settings_by_family():
    assert {row.crop_pct for name, row in RELEASED.items() if name.startswith("cait")} == {1.0}
    assert {row.crop_pct for name, row in RELEASED.items() if name.startswith("deit_")} == {0.9}
    assert find_released("deit3_base_patch16_224").crop_pct == 0.9
    assert find_released("deit3_base_patch16_224.fb_in22k_ft_in1k").crop_pct == 1.0
    assert find_released("vit_small_patch14_reg4_dinov2.lvd142m").image_size == 518
    assert find_released("vit_small_patch16_224.dino").mean == (0.485, 0.456, 0.406)
    assert find_released("regnety_160").crop_pct == 0.875
    assert find_released("vit_base_patch16_224").mean == (0.5, 0.5, 0.5)
    assert find_released("cait_m48_448").std == (0.229, 0.224, 0.225)


# results/results-imagenet.csv of huggingface/pytorch-image-models at commit 0173a139: top1, img_size, crop_pct.
CSV = {
    "deit_tiny_patch16_224": (72.172, 224, 0.9),
    "deit_small_patch16_224": (79.844, 224, 0.9),
    "deit_base_patch16_224": (81.992, 224, 0.9),
    "deit_tiny_distilled_patch16_224": (74.500, 224, 0.9),
    "deit_small_distilled_patch16_224": (81.218, 224, 0.9),
    "deit_base_distilled_patch16_224": (83.386, 224, 0.9),
    "vit_base_patch16_224": (84.532, 224, 0.9),
    "vit_large_patch16_224": (85.834, 224, 0.9),
}
# The same at commit aa4b5850.
CSV |= {
    "vit_tiny_patch16_224": (75.452, 224, 0.9),
    "vit_small_patch16_224": (81.402, 224, 0.9),
    "vit_base_patch16_384": (86.010, 384, 1.0),
    "deit3_small_patch16_224": (81.382, 224, 0.9),
    "deit3_small_patch16_384": (83.432, 384, 1.0),
    "deit3_medium_patch16_224": (83.090, 224, 0.9),
    "deit3_base_patch16_224": (83.800, 224, 0.9),
    "deit3_base_patch16_384": (85.088, 384, 1.0),
    "deit3_large_patch16_224": (84.772, 224, 0.9),
    "deit3_large_patch16_384": (85.820, 384, 1.0),
    "deit3_small_patch16_224.fb_in22k_ft_in1k": (83.082, 224, 1.0),
    "deit3_small_patch16_384.fb_in22k_ft_in1k": (84.846, 384, 1.0),
    "deit3_medium_patch16_224.fb_in22k_ft_in1k": (84.550, 224, 1.0),
    "deit3_base_patch16_224.fb_in22k_ft_in1k": (85.728, 224, 1.0),
    "deit3_base_patch16_384.fb_in22k_ft_in1k": (86.742, 384, 1.0),
    "deit3_large_patch16_224.fb_in22k_ft_in1k": (86.990, 224, 1.0),
    "deit3_large_patch16_384.fb_in22k_ft_in1k": (87.736, 384, 1.0),
}


def test_accuracy_and_crop_are_of_one_source():
    for name, expected in CSV.items():
        row = RELEASED[name]
        assert (row.top1, row.image_size, row.crop_pct) == expected
        assert row.source == "timm's measurement"
    # Not in that table at 224 pixels: the paper's figure with the crop of its code, 224 of 256 pixels.
    teacher = RELEASED["regnety_160"]
    assert (teacher.top1, teacher.crop_pct) == (82.9, 0.875)
    assert teacher.source == "DeiT paper, arXiv 2012.12877"


def test_an_architecture_has_its_papers_figure_and_no_released_one():
    assert published_result("deit_base") == Result(81.8, "DeiT paper, arXiv 2012.12877")
    assert published_result("deit_base_patch16_224") == Result(81.992, "timm's measurement")
    assert published_result("cait_s24").top1 == 82.7
    assert published_result("cait_s24_224").top1 == 83.484
    for name in ("vit_base", "vit_huge", "cait_m48", "cait_nano4_patch4_8"):
        assert published_result(name) is None


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cait_xs24", r"no weights were released as cait_xs24; .* was as cait_xs24_384, which can"),
        ("cait_s24", r"as cait_s24_224 and cait_s24_384"),
        ("cait_s48", r"no weights were released for cait_s48: give weights=PATH, or choose"),
        ("vit_huge", r"no weights were released for vit_huge"),
        ("vit_tiny", r"was as vit_tiny_patch16_224, "),
        ("deit_tiny", r"was as deit_tiny_patch16_224, "),
        ("cait_xxs24_225", r"no model 'cait_xxs24_225'; nearest: cait_xxs24_224"),
    ],
)
def test_a_name_without_weights(name, sentence):
    with pytest.raises(UserError, match=sentence) as caught:
        find_released(name)
    assert "\n" not in str(caught.value)


ROW = find_released("cait_xxs24_224")
WEIGHTS = {"head.weight": np.arange(3000, dtype=np.float32).reshape(30, 100)}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_safetensors(tmp_path / "model.safetensors", WEIGHTS)
    body = (tmp_path / "model.safetensors").read_bytes()
    with serve_hub({ROW.hub_id: body}) as server:
        point_at(monkeypatch, server.server_port, tmp_path / "cache")
        yield server


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_the_file_is_downloaded_once(hub):
    file = download(ROW)
    np.testing.assert_array_equal(read_weights(file)["head.weight"], WEIGHTS["head.weight"])
    assert hub.requests[-1] == ("GET", f"/{ROW.hub_id}/resolve/main/model.safetensors")
    hub.requests.clear()
    assert download(ROW) == file
    assert {command for command, _ in hub.requests} == {"HEAD"}


def test_a_pinned_revision_in_the_cache_is_not_asked_for_again(hub):
    pinned = dataclasses.replace(ROW, revision=COMMIT)
    file = download(pinned)
    assert all(f"/resolve/{COMMIT}/" in path for _, path in hub.requests)
    hub.requests.clear()
    assert download(pinned) == file
    assert hub.requests == []


def test_the_sum_of_the_table_is_held(hub):
    digest = hashlib.sha256(hub.files[ROW.hub_id]).hexdigest()
    assert download(dataclasses.replace(ROW, sha256=digest)).is_file()
    with pytest.raises(
        UserError, match=rf"has SHA-256 {digest} instead of 0000.*: remove .* again"
    ):
        download(dataclasses.replace(ROW, sha256="0" * 64))


def test_pins_hold_downloads_to_a_commit_and_a_checksum(hub, tmp_path, monkeypatch, caplog):
    download(ROW)
    assert caplog.messages == [
        f"model.safetensors of {ROW.hub_id} is not pinned: it is the newest that the hub has, compared with no "
        "checksum (CAIT_PINS=FILE names the pins that `cait models --pin FILE` writes)"
    ]
    caplog.clear()
    download(ROW)  # from the cache
    pins = tmp_path / "pins.json"
    hub.requests.clear()
    result = CliRunner().invoke(main, ["models", ROW.name, "--pin", str(pins)])
    assert result.stdout == f"{pins}: pins of 1 released models\n"
    assert hub.requests == [("HEAD", f"/{ROW.hub_id}/resolve/main/model.safetensors")]
    digest = hashlib.sha256(hub.files[ROW.hub_id]).hexdigest()
    assert read_pins(pins) == {ROW.hub_id: Pin(COMMIT, digest)}
    monkeypatch.setenv("CAIT_PINS", str(pins))
    hub.requests.clear()
    download(ROW)
    assert hub.requests == []  # this commit is in the cache
    write_pins(pins, {ROW.hub_id: Pin(COMMIT, "0" * 64)})
    with pytest.raises(UserError, match=rf"has SHA-256 {digest} instead of 0000"):
        download(ROW)
    assert not caplog.messages


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (None, "cannot be read"),
        ("[", "is no file of pins"),
        ("[" * 100_000, "is no file of pins"),
        ("[]", "is no file of pins"),
        ('{"format": 2, "pins": {}}', "of format 2, and this version reads 1"),
        ('{"format": 1, "pins": {"timm/a": {"revision": "main", "sha256": "0"}}}', "no pin for 'timm/a'"),
        ('{"format": 1, "pins": {"timm/a": 3}}', "no pin for 'timm/a'"),
    ],
)  # fmt: skip
def test_a_file_that_is_none_of_pins(text, sentence, tmp_path, monkeypatch):
    file = tmp_path / "pins.json"
    if text is not None:
        file.write_text(text)
    monkeypatch.setenv("CAIT_PINS", str(file))
    with pytest.raises(UserError, match=sentence) as caught:
        download(ROW)
    assert "\n" not in str(caught.value)


def test_what_the_hub_does_not_say_is_not_pinned(hub, tmp_path):
    with pytest.raises(UserError, match="does not answer for timm/none"):
        ask_for_pins(["timm/none"], "model.safetensors")
    hub.fault = 503
    with pytest.raises(UserError, match="connect to the network, or try again later"):
        ask_for_pins([ROW.hub_id], "model.safetensors")


@pytest.mark.parametrize(
    ("status", "sentence"),
    [
        (404, r"refused .* \(HTTP 404\): check that it exists .* weights=PATH"),
        (403, r"refused .* \(HTTP 403\): check that it exists and may be read"),
        (500, r"refused .* \(HTTP 500\): try again later, or give weights=PATH"),
    ],
)
def test_a_refusal_is_said_in_one_sentence(hub, status, sentence):
    hub.fault = status
    with pytest.raises(UserError, match=sentence) as caught:
        download(ROW)
    assert "\n" not in str(caught.value)
    assert len(hub.requests) == 1


def test_a_download_cut_off_is_tried_again(hub):
    hub.fault = "cut once"
    assert read_weights(download(ROW))


def test_a_download_that_breaks_off_leaves_no_file(hub, tmp_path):
    hub.fault = "cut"
    with pytest.raises(UserError, match=r"broke off \(.*\): try again, .* weights=PATH") as caught:
        download(ROW)
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    hub.fault = None
    assert read_weights(download(ROW))


def test_offline_takes_the_cache_and_never_the_network(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"not in the cache .* HF_HUB_OFFLINE forbids .* unset it"):
        download(ROW)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    file = download(ROW)
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert download(ROW) == file
    assert hub.requests == []


def test_without_a_network_the_cache_serves_and_otherwise_the_answer_comes_at_once(
    hub, monkeypatch, tmp_path
):
    port = hub.server_port
    point_at(monkeypatch, free_port(), tmp_path / "cache")
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached .* connect to the network, set HF_HUB"):
        download(ROW)
    assert time.monotonic() - start < 5
    point_at(monkeypatch, port, tmp_path / "cache")
    file = download(ROW)
    hub.fault = 503
    assert download(ROW) == file
    point_at(monkeypatch, free_port(), tmp_path / "cache")
    assert download(ROW) == file
