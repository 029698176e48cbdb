"""Messages name the command's own options, nothing of Python or train.py; every number has a finite range."""

import json
import re
import types

import click
import huggingface_hub
import jax
import numpy as np
import pytest
from click.testing import CliRunner
from huggingface_hub import constants
from PIL import Image
from safetensors.numpy import load_file, save_file

from cait_jax import create_model, save_pretrained
from cait_jax.cli import COMMANDS, main
from cait_jax.cli.common import Finite
from cait_jax.train import nonfinite

# Of Python: an argument with its value, a call, a name of the package.
PYTHON = re.compile(r"(?<![\w.-])[a-z_]+=|\w+\(|cait_jax\.|save_pretrained|load_pretrained")
OPTION = re.compile(r"(?<![\w/])--[a-z][\w.-]*")


@pytest.fixture(scope="module")
def places(network, saved, tmp_path_factory):
    """Files and folders that commands cannot use, by name."""
    root = tmp_path_factory.mktemp("places")
    model, variables = network
    weights = load_file(saved / "model.safetensors")
    bad = weights["head.bias"].copy()
    bad[0] = np.nan
    files = {
        "nan": weights | {"head.bias": bad},
        "mixed": {f"module.{k}" if "head" in k else k: v for k, v in weights.items()},
        "headless": {k: v for k, v in weights.items() if "head" not in k},
        "wide": {k: v.astype(np.float64) for k, v in weights.items()},
        "others": weights
        | {"head.bias": np.zeros(5, "f4"), "head.weight": np.zeros((5, 64), "f4")},
        "oblong": weights | {"pos_embed": np.zeros((1, 6, 64), "f4")},
        "plain": weights,
    }
    for name, content in files.items():
        save_file(content, root / f"{name}.safetensors")
    save_pretrained(root / "unprepared", model, variables)
    (root / "foreign").mkdir()
    (root / "foreign" / "config.json").write_text(json.dumps({"architecture": "x"}))
    grey = create_model("cait_nano4_patch4_8", depth=1, num_classes=3)
    settings = {"image_size": [8, 8], "crop_pct": 1.0, "mean": [0.5], "std": [0.5], "channels": 1}
    params = jax.tree.map(np.asarray, grey.init(jax.random.key(0), np.zeros((1, 8, 8, 1))))
    save_pretrained(root / "grey", grey, params, preprocessing=settings)
    for i in range(48):
        path = root / "pictures" / ("train", "val")[i % 2] / ("a", "b", "c")[i % 3] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 9), (i, 0, 0)).save(path)
    (root / "one" / "a").mkdir(parents=True)
    Image.new("RGB", (9, 9)).save(root / "one" / "a" / "0.png")
    Image.new("RGB", (9, 9)).save(root / "picture.png")
    return {path.stem: str(path) for path in root.iterdir()} | {"saved": str(saved)}


def said(arguments, places):
    """The sentence of a command that fails, and the command's own options."""
    words = [word.format(**places) for word in arguments.split()]
    result = CliRunner().invoke(main, words, prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code != 0, result.output
    command = main.get_command(click.Context(main), words[0])
    return result.stderr.strip().splitlines()[-1], {o for p in command.params for o in p.opts}


def check(sentence, options, places):
    """Fails for words of another interface, the paths of files aside."""
    for path in sorted(places.values(), key=len, reverse=True):
        sentence = sentence.replace(path, "PATH")
    sentence = re.sub(r"`cait [^`]*`", "COMMAND", sentence)
    if "--config" not in options:  # `cait plan` takes train.py's keys
        assert not PYTHON.search(sentence), sentence
        assert not re.search(r"--config|(image|batch)_size", sentence), sentence
    for option in OPTION.findall(sentence):
        assert option in options or option.startswith("--config."), sentence


MODELS = [
    "-m {plain}",
    "-m {saved} --weights {nan}",
    "-m {saved} --weights {mixed}",
    "-m {saved} --weights {headless}",
    "-m {saved} --weights {wide}",
    "-m {saved} --weights {others}",
    "-m {saved} --weights {oblong} --image-size 16",
    "-m {saved} --weights {picture}",
    "-m {saved} --weights nowhere.pth",
    "-m {saved} --image-size 9",
    "-m {foreign}",
    "-m ./nowhere",
    "-m cait_s48",
    "-m cait_xs24",
    "-m cait_xs",
]
READS = [
    "predict {picture}",
    "features {picture} -o {pictures}/f.npz",
    "evaluate --data {pictures}",
]


@pytest.mark.parametrize(
    "model", [*MODELS, "-m {unprepared}", "-m {saved} --ema", "-m {plain} --ema"]
)
@pytest.mark.parametrize("command", [*READS, "convert {pictures}/out"])
def test_of_a_model_that_cannot_be_used(command, model, places):
    if command.startswith("features") and re.search("headless|others", model):
        return  # features need no head
    check(*said(f"{command} {model}", places), places)


@pytest.mark.parametrize(
    "rest",
    [
        *(model for model in MODELS if not re.search("headless|wide|others|cait_xs$", model)),
        "-m {unprepared}",
        "-m {grey}",
        "-m regnety_160",
        "-m {saved} --batch-size 49",
        "-m {saved} --epochs nan",
        "-m {saved} --what everything",
    ],
)
def test_of_finetune(rest, places, tmp_path):
    check(*said(f"finetune {{pictures}} --workdir {tmp_path}/run {rest}", places), places)


@pytest.mark.parametrize(
    ("rest", "sentence"),
    [
        ("predict {picture} -m {saved} --weights {others}", "5 classes and the model 3: choose weights of 3"),
        ("predict {picture} -m {plain}", "give --model NAME and --weights "),
        ("predict {picture} -m cait_s48", "give --weights PATH, or choose one of"),
        ("predict {picture} -m cait_xs24", "can be loaded with another --image-size"),
        ("predict {picture} -m {saved} --ema", "leave out --ema"),
        ("convert -m {plain} x", "give --model NAME and --weights "),
        ("finetune {one} -m {saved}", "has one class, a"),
        ("finetune {pictures} -m {saved} --batch-size 49", "such as --batch-size 24"),
        ("plan --config=configs/digits.py --topology=v5e:2x2 --config.batch_size=1.5",
         "--config.batch_size is 1.5 and must be a whole number of 1 or more"),
        ("plan --config=configs/digits.py --topology=v5e:2x2 --config.epochs=inf",
         "--config.epochs is inf and must be a finite number"),
        ("plan --config=configs/digits.py --topology=h100:8 --config.optimizer.grad_accum=3",
         "set --config.batch_size=48"),
        ("plan --config=configs/digits.py --topology=v5e:2x2 --config.lr=3", "no config key 'lr'"),
        ("plan --config=configs/digits.py --topology=v5e:2x2 --batch-size=3",
         "unknown argument --batch-size=3"),
    ],
)  # fmt: skip
def test_the_fix_is_an_option_of_the_command(rest, sentence, places):
    found, options = said(rest, places)
    assert sentence in found
    typed = {word.partition("=")[0] for word in rest.split()} | {"--help"}
    check(found, options | typed, places)


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(
    "command", [*READS, "convert {pictures}/out", "finetune {pictures} --workdir {pictures}/run"]
)
def test_without_a_network_the_fix_is_an_option(command, offline, places, tmp_path, monkeypatch):
    def unreachable(*_, **__):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    found, options = said(f"{command} -m cait_xxs24_224", places)
    assert "give --weights PATH with a file of cait_xxs24_224" in found
    check(found, options, places)


@pytest.mark.slow
def test_a_run_that_was_begun_otherwise_names_the_options(places, tmp_path):
    begun = f"finetune {{pictures}} -m {{saved}} --workdir {tmp_path}/run --epochs"
    result = CliRunner().invoke(main, f"{begun} 1".format(**places).split(), prog_name="cait")
    assert result.exit_code == 0, result.output
    found, options = said(f"{begun} 3 --seed 2", places)
    assert "--epochs was 1.0 and is now 3.0; --seed was 0 and is now 2" in found
    check(found, options | {"--workdir"}, places)


@pytest.mark.slow
def test_a_loss_that_is_not_finite_names_an_option(places, tmp_path, monkeypatch):
    monkeypatch.setattr(nonfinite, "math", types.SimpleNamespace(isfinite=lambda value: False))
    found, options = said(
        f"finetune {{pictures}} -m {{saved}} --workdir {tmp_path}/run --epochs 1", places
    )
    assert re.search(r"step \d+ has .*: let less learn, by --what head, or take other", found)
    check(found, options | {"--workdir"}, places)


def options(command):
    """Every option of a command and of those below it."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from options(command.get_command(click.Context(command), name))
    for param in command.params:
        yield command.name, param


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name):
    command = main.get_command(click.Context(main), name)
    for owner, param in options(command):
        kind = param.type
        if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
            assert isinstance(kind, click.IntRange | Finite), (owner, param.name)
            assert kind.min is not None, (owner, param.name)
            assert kind.max is not None, (owner, param.name)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x"])
def test_only_finite_numbers_pass(text):
    with pytest.raises(click.BadParameter):
        Finite().convert(text, None, None)
    assert Finite().convert("1e3", None, None) == 1000.0


@pytest.mark.parametrize(
    "arguments",
    [
        "finetune x -m y --epochs nan",
        "finetune x -m y --epochs inf",
        "finetune x -m y --seed -1",
        "predict x -m y --image-size 0",
        "predict x -m y --image-size -5",
        "predict x -m y --batch-size 1e3",
        "evaluate --data x -m y --workers -1",
    ],
)
def test_a_number_out_of_range_names_the_option(arguments):
    result = CliRunner().invoke(main, arguments.split(), prog_name="cait")
    assert result.exit_code == 2
    option = arguments.split()[-2]
    assert f"Error: Invalid value for '{option}'" in result.stderr.splitlines()[-1]
