"""A config from a command line: unknown keys, wrong values and differences are named; no key goes unread."""

import re
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cait_jax import UserError
from cait_jax.train import train
from cait_jax.train.config import (
    check_values,
    default_workdir,
    flatten,
    load_config,
    parse_command_line,
)
from cait_jax.train.keys import KEYS
from cait_jax.train.setup import build
from configs import common, digits

CONFIGS = Path(__file__).parents[2] / "configs"


DIGITS = f"--config={CONFIGS / 'digits.py'}"


def read(*argv):
    """The config of a command line of train.py."""
    line = parse_command_line(argv)
    assert line.rest == []
    return load_config(line.file, line.overrides)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.batchsize=3"], "there is no config key 'batchsize'; nearest: batch_size"),
        (
            ["--config.model.drop_pat=3"],
            "no config key 'model.drop_pat'; nearest: model.drop_path_rate",
        ),
        (["--config.seed=1", "--config.optimizer.lr=3"], "no config key 'optimizer.lr'"),
    ],
)
def test_an_unknown_key_names_the_nearest(argv, message):
    with pytest.raises(UserError, match=message):
        read(DIGITS, *argv)


def test_a_missing_config_file_names_the_nearest():
    for flag in (["--config=configs/digit.py"], ["--config", "configs/digit.py"]):
        with pytest.raises(UserError, match=r"nearest: configs/digits\.py"):
            read(*flag)


@pytest.mark.parametrize(
    ("source", "sentence"),
    [
        ("def get_config(:", "line 1: SyntaxError"),
        ("import nothing_of_this_name", "line 1: ModuleNotFoundError"),
        ("x = 1", "has no get_config"),
        (
            "from configs import common\ndef get_config():\n  config = common.get_config()\n"
            "  config.batch_size = 6.5\n  return config",
            "line 4: TypeError",
        ),
        (
            "from configs import common\ndef get_config():\n  config = common.get_config()\n"
            "  config.augment.erase = 0.5\n  return config",
            r"line 4: AttributeError.*; the key is augment\.reprob now",
        ),
        (
            "from configs import common\ndef get_config():\n"
            "  return common.get_config().optimizer.accumulate",
            r"line 3: AttributeError.*; the key is optimizer\.grad_accum now",
        ),
        ("def get_config():\n  return {'seed': 1}", "is a dict, not a ConfigDict: start from "),
        ("def get_config():\n  pass", "is a NoneType, not a ConfigDict: start from "),
        (
            "from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'seed': 1})",
            r"the config lacks augment\.color_jitter, .* and \d+ more: start from ",
        ),
        (
            "from configs import common\ndef get_config():\n  config = common.get_config().unlock()\n"
            "  config.model.widht = 3\n  return config",
            r"there is no config key 'model\.widht'; nearest: model\.width",
        ),
    ],
)
def test_a_config_file_that_fails_is_named_with_the_line(tmp_path, source, sentence):
    file = tmp_path / "mine.py"
    file.write_text(source)
    with pytest.raises(UserError, match=rf"mine\.py.*{sentence}") as caught:
        load_config(str(file))
    assert "\n" not in str(caught.value)


def test_every_way_to_write_a_setting():
    config = read(
        DIGITS, "--config.seed=3", "--config.seed", "4", "-config.epochs=2", "--noconfig.augment.hflip",
        "--config.data.balanced", "--config.augment.scale=0.5,1", "--config.data.mean=[0.25]",
        "--config.image_size=(8, 8)", "--config.model.attention=None", "--config.mesh.data=-1",
        "--config.model.class_token=2", "--config.augment.rand_augment=", "--config.init.ema=true",
    )  # fmt: skip
    assert (config.seed, config.epochs, type(config.epochs)) == (4, 2.0, float)
    assert (config.augment.hflip, config.data.balanced, config.init.ema) == (False, True, True)
    assert (config.augment.scale, config.data.mean) == ((0.5, 1.0), (0.25,))
    assert (config.image_size, config.model.attention, config.mesh.data) == ((8, 8), None, -1)
    assert (config.model.class_token, config.augment.rand_augment) == ("2", "")
    assert config.is_locked
    line = parse_command_line(["--workdir=x", "--config=a.py:b=c", "--", "--config.seed=1"])
    assert (line.file, line.overrides) == ("a.py:b=c", {})
    assert line.rest == ["--workdir=x", "--", "--config.seed=1"]


def test_every_key_has_a_rule_that_its_default_fits():
    config = common.get_config()
    assert KEYS.keys() == flatten(config).keys()
    check_values(config)


def test_every_argument_of_a_config_has_a_workdir_of_its_own():
    names = {
        "configs/a.py": "a",
        "configs/a.py:": "a",
        "b.py:384": "b-384",
        "b.py:x,y_1": "b-x,y_1",
    }
    assert {file: default_workdir(file).name for file in names} == names
    arguments = [
        "x", "photos/a", "photos-a", "photos_a", "photos a", "Photos/a", "PHOTOS/A", "/photos/a", "./photos/a",
        "a", "á", "a\u0301", "b:c", "b-c", "..", ".", "/", "~", "con.", "12345678", "\udcff", "x" * 100, "x" * 101,
        "photos/" + "x" * 100,
    ]  # fmt: skip
    arguments += [default_workdir(f"a.py:{argument}").name[2:] for argument in arguments[1:]]
    found = [default_workdir(f"configs/a.py:{argument}") for argument in dict.fromkeys(arguments)]
    assert len({str(path).lower() for path in found}) == len(found)
    for path in found:
        assert path.parent == Path("runs")
        assert re.fullmatch(r"a-[a-z0-9_,-]{1,49}", path.name)
    assert default_workdir("a.py:photos/a/") == default_workdir("a.py:photos/a")


@pytest.mark.parametrize(
    ("key", "text", "wanted"),
    [
        ("augment.scale", "0.5", "2 increasing finite numbers in [0.001, 1], such as 0.08,1"),
        ("augment.scale", "1,nan", "2 increasing finite numbers in [0.001, 1], such as 0.08,1"),
        ("augment.scale", "1,0.5", "2 increasing finite numbers in [0.001, 1], such as 0.08,1"),
        (
            "data.mean", "(0.5,0.5)",
            "1 or 3 finite numbers of at least -1,000 and at most 1,000, such as 0.485,0.456,0.406",
        ),
        ("data.std", "0", "1 or 3 finite numbers of at least 0.001 and at most 1,000, such as 0.229,0.224,0.225"),
        ("batch_size", "6.5", "a whole number of 1 or more"),
        ("batch_size", "1e3", "a whole number of 1 or more"),
        ("batch_size", "3000000000", "a whole number of 1 or more and at most 2,147,483,647"),
        ("image_size", "8,8,8", "a whole number from 1 to 16,384, or height and width, such as 224,192"),
        ("seed", "-1", "a whole number from 0 to 4,294,967,295"),
        ("epochs", "1e9", "a finite number above 0 and at most 1,000,000"),
        ("optimizer.learning_rate", "nan", "a finite number of at least 0 and at most 1,000"),
        ("model.drop_path_rate", "1.5", "a finite number in [0, 1), or None"),
        ("model.dtype", "float16", "one of bfloat16, float32, float64; nearest: bfloat16"),
        ("optimizer.name", "adam", "one of adamw, lamb, lion, muon, sgd; nearest: adamw"),
        ("model.name", "cait_xs", "a known name; nearest: cait_xs36, cait_xs24, cait_xxs36"),
        ("optimizer.train", "-1", "one of all, head, class_attention, or a whole number of 0 or more"),
        ("mesh.data", "0", "a whole number of 1 or more, or -1"),
        ("augment.hflip", "maybe", "True or False"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_told_what_it_must_be(key, text, wanted):
    with pytest.raises(UserError) as caught:
        load_config(str(CONFIGS / "digits.py"), {key: text})
    assert str(caught.value) == f"--config.{key} is {text} and must be {wanted}"


def test_every_key_has_a_meaning_and_a_line_of_its_own():
    assert all(len(key.meaning) >= 4 for key in KEYS.values())
    lines = (CONFIGS.parent / "cait_jax" / "train" / "keys.py").read_text().splitlines()
    assert [line.split('"')[1] for line in lines if ": Key(" in line] == list(KEYS)


@pytest.mark.slow
def test_no_key_goes_unread(tmp_path, monkeypatch):
    """Of a short run, and of one that starts from it, learns from it and is in phases."""
    config = digits.get_config()
    config.steps = 2
    config.batch_size = 8
    config.model.depth = config.model.class_depth = 1
    config.model.width = 8
    config.model.num_heads = 1
    other = config.copy_and_resolve_references()
    other.init.weights = other.distill.teacher = str(tmp_path)
    other.distill.kind = "soft"
    other.phases.head_epochs, other.phases.blocks = 1.0, 1

    sections = {
        id(section): f"{name}." * bool(name)
        for whole in (config, other)
        for name, section in {"": whole, **whole}.items()
        if isinstance(section, ConfigDict)
    }
    read = set()

    def watch(method):
        original = getattr(ConfigDict, method)

        def watched(self, name):
            if id(self) in sections:
                read.add(sections[id(self)] + name)
            return original(self, name)

        monkeypatch.setattr(ConfigDict, method, watched)

    watch("__getattr__")
    watch("__getitem__")
    train(config, tmp_path)
    build(other).init_state()
    # The model's keys are arguments of create_model, which refuses one that it does not know.
    unread = {key for key in flatten(config) if not key.startswith("model.")} - read
    assert unread == set()
