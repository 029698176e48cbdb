"""`cait data`, run as a user would."""

import json
import re

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from tfds_files import encode, noise, write_cifar10

from cait_jax.cli import main

EXAMPLES = [(encode(noise(seed, 32, 32)), seed) for seed in range(5)]


def cait_data(*arguments, status=0):
    """Standard output and standard error of a command that ends with `status`."""
    result = CliRunner().invoke(main, ["data", *(str(a) for a in arguments)], prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


@pytest.fixture
def data_dir(tmp_path):
    write_cifar10(tmp_path, {"train": EXAMPLES, "test": EXAMPLES[:2]})
    return tmp_path


@pytest.mark.parametrize("command", ["prepare", "convert", "show"])
def test_every_command_explains_itself_with_an_example(command):
    assert f"Example: cait data {command} " in " ".join(cait_data(command, "--help")[0].split())


def test_a_data_set_is_shown(data_dir):
    out, _ = cait_data("show", "cifar10", "--data-dir", data_dir, "--sheet", data_dir / "s.png")
    lines = out.splitlines()
    assert lines[2].split()[:2] == ["train", "5"]
    assert lines[3].split()[:2] == ["test", "2"]
    assert "10 classes: airplane, automobile" in out
    assert f"{data_dir / 's.png'} shows images of train" in out
    with Image.open(data_dir / "s.png") as sheet:
        assert sheet.size == (5 * 128, 144)

    found = json.loads(cait_data("show", "cifar10", "--data-dir", data_dir, "--json")[0])
    assert [split["images"] for split in found["splits"]] == [5, 2]
    assert found["splits"][0]["width"] == [32, 32, 32]
    assert len(found["classes"]) == 10


def test_a_folder_is_shown(tmp_path):
    for number in range(30):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(EXAMPLES[number % 5][0])
    (tmp_path / "photos/a/broken.jpg").write_bytes(b"???")
    out, err = cait_data("show", tmp_path / "photos", "--sheet", tmp_path / "s.png")
    assert "1 of 31" in out
    assert re.search(r"broken in all: image \d+ \(a/broken\.jpg\)$", err, re.MULTILINE)
    assert "2 classes: a, b" in out
    assert "1 images on it are broken" in out
    found = json.loads(cait_data("show", tmp_path / "photos", "--split", "train", "--json")[0])
    assert 15 < found["splits"][0]["images"] < 31


def test_a_data_set_is_converted(tmp_path):
    data_dir = tmp_path
    splits = {"train": EXAMPLES, "test": EXAMPLES[:2]}
    folder = write_cifar10(data_dir, splits, file_format="tfrecord")
    _, err = cait_data("show", "cifar10", "--data-dir", data_dir, status=1)
    assert f"run: cait data convert {folder}" in err
    assert "(2 of 2 files written)" in cait_data("convert", folder)[0]
    assert "nothing to do" in cait_data("convert", folder)[0]
    found = json.loads(cait_data("convert", data_dir, "--json")[0])
    assert found == {"folder": str(folder), "records": 7, "files": 2, "written": 0}
    assert "train" in cait_data("show", "cifar10", "--data-dir", data_dir)[0]


def test_what_preparing_takes_is_said(data_dir, tmp_path):
    out, err = cait_data("prepare", "cifar10", "--data-dir", data_dir)
    assert (out, "as array_record: nothing to do" in err) == ("", True)
    elsewhere = tmp_path / "elsewhere"
    _, err = cait_data("prepare", "imagenet2012", "--data-dir", elsewhere, "--dry-run")
    assert f"imagenet2012 goes to {elsewhere / 'imagenet2012' / '5.1.0'}" in err
    assert f"by hand into {elsewhere / 'downloads' / 'manual'}" in err
    out, _ = cait_data("prepare", "cifar10", "--data-dir", elsewhere, "--dry-run", "--json")
    plan = json.loads(out)
    assert (plan["prepared"], plan["manual"]) == (False, None)
    assert np.isfinite(plan["free_bytes"])
    assert not elsewhere.exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["prepare", "cifra10"], "nearest: cifar10"),
        (["convert", "nowhere"], "there is no folder nowhere"),
        (["show", "./nowhere"], "there is no folder nowhere"),
        (["show", "digits", "--split", "tran"], "nearest: train"),
        (["show", "digits", "--sheet", "no/such.png"], "make it"),
    ],
)
def test_mistakes_are_sentences(arguments, sentence, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sentence in cait_data(*arguments, status=1)[1]
