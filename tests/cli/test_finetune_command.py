"""`cait finetune` on a folder of small pictures whose classes are colours."""

import itertools
import json
import re
import shlex
import signal

import numpy as np
import pytest
from click.testing import CliRunner
from marks import slow
from PIL import Image
from run_files import untimed
from trees import assert_same_bits

from cait_jax import load_pretrained
from cait_jax.cli import main
from cait_jax.sharding import put_batch
from cait_jax.train import loop

COLOURS = {"blue": (40, 60, 200), "green": (50, 180, 60), "red": (210, 50, 40)}


def cait(*arguments, status=0):
    """Standard output and standard error of a command that ends with `status`."""
    result = CliRunner().invoke(main, [str(a) for a in arguments], prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == status, result.output
    return result.stdout, result.stderr


def write_colours(root, count):
    """`count` noisy pictures of each colour, in `root/CLASS/`."""
    rng = np.random.default_rng(len(root.name))
    for name, colour in COLOURS.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            pixels = np.clip(np.array(colour) + rng.normal(0, 25, (10, 12, 3)), 0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i}.png")


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    root = tmp_path_factory.mktemp("colours")
    write_colours(root / "train", 16)
    write_colours(root / "val", 6)
    return root


@pytest.mark.slow
def test_a_folder_is_learnt_stopped_resumed_and_used(colours, saved, tmp_path, monkeypatch):
    whole, halves = tmp_path / "whole run", tmp_path / "halves"
    arguments = ["finetune", colours, "--model", saved, "--epochs", "60", "--workdir"]
    out, err = cait(*arguments, whole)
    assert "48 images of 3 classes to learn from, 18 to measure on" in out
    assert "a head that is fitted on features, then the last 3 blocks too (60 epochs)" in out
    found = re.search(r"accuracy (\S+)% on the 18 images of val; try it: (cait predict .+)", out)
    assert float(found[1]) > 80
    assert "step 90/90" in err

    # Ctrl-C while batches are on their way.
    batches = itertools.count(1)

    def interrupted(batch, sharding):
        if next(batches) == 31:
            signal.raise_signal(signal.SIGINT)
        return put_batch(batch, sharding)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "put_batch", interrupted)
        _, err = cait(*arguments, halves, status=130)
    assert "stopped after step 31 of 90: the same command goes on from there" in err
    again, _ = cait(*arguments, halves)
    assert found[0].replace("whole run", "halves").split(";")[0] in again
    assert untimed(halves) == untimed(whole)

    # The command that the last line names, with a picture.
    picture = colours / "val" / "red" / "0.png"
    predict = [str(picture) if word == "IMAGE" else word for word in shlex.split(found[2])[1:]]
    out, _ = cait(*predict, "--json")
    best = json.loads(out)["predictions"][0]
    assert best["label"] == "red"
    model, _ = load_pretrained(whole)
    assert model.num_classes == 3
    assert model.depth == 1

    # What is finished is read back, and another request in its place is refused.
    assert found[0] in cait(*arguments, whole)[0]
    _, err = cait(*arguments, whole, "--seed", "1", status=1)
    assert "seed was 0 and is now 1" in err


@pytest.mark.parametrize(("epochs", "steps"), [slow("1", 2), ("0.01", 1)])
def test_the_shortest_run_of_two_phases_trains(colours, saved, tmp_path, epochs, steps):
    """As a first try of a new folder is: it has a step at least."""
    out, err = cait(
        "finetune", colours, "-m", saved, "--what", "two-phase", "--epochs", epochs, "--workdir",
        tmp_path / "run",
    )  # fmt: skip
    assert f"step {steps}/{steps}" in err
    assert "on the 18 images of val" in out


@pytest.mark.slow
def test_a_run_may_be_where_another_starts(colours, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out, _ = cait(
        "finetune", colours, "-m", saved, "--what", "all", "--epochs", "1", "--batch-size", "48"
    )
    assert "learns the whole network (1 epochs), 48 images a step" in out
    workdir = tmp_path / "runs" / f"{colours.name}-small"
    out, _ = cait("finetune", colours, "-m", workdir, "--what", "all", "--epochs", "1")
    assert "learns the whole network" in out
    assert (tmp_path / "runs" / f"{colours.name}-{workdir.name}" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_adapters_are_learnt_and_read_merged(colours, saved, tmp_path):
    workdir = tmp_path / "run"
    command = ["finetune", colours, "-m", saved, "--what", "lora", "--workdir", workdir]
    out, _ = cait(*command, "--rank", "2", "--alpha", "4", "--epochs", "40")
    assert "a head that is fitted on features, then adapters of rank 2 too (40 epochs)" in out
    found = re.search(r"accuracy (\S+)% on the 18 images of val", out)
    assert float(found[1]) > 80
    out, _ = cait("evaluate", "--data", colours, "-m", workdir, "--split", "val", "--json")
    assert json.loads(out)["top1"] == pytest.approx(float(found[1]) / 100, abs=1e-3)
    assert_same_bits(
        load_pretrained(workdir)[1]["params"]["pos_embed"],
        load_pretrained(saved)[1]["params"]["pos_embed"],
    )
    _, err = cait(*command, "--rank", "3", "--alpha", "4", "--epochs", "40", status=1)
    assert "--rank was 2 and is now 3" in err


def test_a_head_alone_is_fitted_on_features(colours, saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["finetune", colours, "-m", saved, "--what", "head"]
    out, err = cait(*command)
    assert "48 images of 3 classes to learn from, 18 to measure on" in out
    assert "gives each its features once, and a head is fitted on them" in out
    found = re.search(r"accuracy (\S+)% on the 18 images of val; try it: (cait predict .+)", out)
    assert float(found[1]) > 90
    workdir = tmp_path / "runs" / f"{colours.name}-small"
    assert {path.name for path in workdir.iterdir()} == {
        "config.json",
        "model.safetensors",
        "features.npz",
    }
    before, after = load_pretrained(saved)[1]["params"], load_pretrained(workdir)[1]["params"]
    before.pop("head")
    kernel = after.pop("head")["kernel"]
    assert_same_bits(after, before)
    picture = colours / "val" / "red" / "0.png"
    predict = [str(picture) if word == "IMAGE" else word for word in shlex.split(found[2])[1:]]
    best = json.loads(cait(*predict, "--json")[0])["predictions"][0]
    assert best["label"] == "red"

    # The same command gives the same, from the features of before; others start from it.
    monkeypatch.setattr("cait_jax.train.head.run_over_photographs", None)
    assert found[0] in cait(*command)[0]
    np.testing.assert_array_equal(load_pretrained(workdir)[1]["params"]["head"]["kernel"], kernel)
    _, err = cait(*command, "--epochs", "2", status=1)
    assert (
        "--epochs 2 goes with training, and --what head fits the head at once: leave it out" in err
    )
    (workdir / "checkpoints").mkdir()
    _, err = cait(*command, status=1)
    assert "is a training run: give another --workdir, or remove it" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere", "-m", "cait_xxs24_224"], "there is no folder"),
        (["{colours}/train/red", "-m", "cait_xxs24_224"], "holds no class folders"),
        (["{one}", "-m", "cait_xxs24_224"], "has one class, red"),
        (["{colours}", "-m", "cait_s48"], "no weights were released for cait_s48"),
        (["{colours}", "-m", "cait_xs"], "there is no model 'cait_xs'; nearest: cait_xs36"),
        (["{colours}", "-m", "{saved}", "--weights", "no.pth"], "no.pth"),
        (["{colours}", "-m", "{saved}", "--batch-size", "49"], "such as --batch-size 48"),
        (
            ["{colours}", "-m", "{saved}", "--rank", "4"],
            "--rank 4 is for adapters: give --what lora too",
        ),
        (
            ["{colours}", "-m", "{saved}", "--what", "lora", "--rank", "999"],
            "--rank 999 is above the network's width",
        ),
        (
            ["{colours}", "-m", "{saved}", "--what", "head", "--rank", "4"],
            "--rank 4 goes with training",
        ),
        (
            ["{colours}", "-m", "{saved}", "--image-size", "9"],
            "--image-size 9x9 cannot be cut in patches of 4x4",
        ),
    ],
)
def test_mistakes_are_sentences_and_leave_nothing(
    arguments, sentence, colours, saved, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    one = tmp_path / "one"
    write_colours(one, 1)
    for name in ("blue", "green"):
        (one / name / "0.png").unlink()
        (one / name).rmdir()
    places = {"colours": colours, "saved": saved, "one": one}
    _, err = cait(
        "finetune", *(word.format(**places) for word in arguments), "--workdir", "run", status=1
    )
    assert sentence in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()
