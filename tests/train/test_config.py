"""Unknown keys are named, differences are listed, and no key of the base config goes unread."""

from pathlib import Path

import pytest
from ml_collections import ConfigDict

from cait_jax import UserError
from cait_jax.train import defaults, train
from cait_jax.train.config import as_json, check_command_line, check_resumable, flatten
from configs import common, digits

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--config.batchsize=3"], "there is no config key 'batchsize'; nearest: batch_size"),
        (["--config.model.drop_pat=3"], "no config key 'model.drop_pat'; nearest: model.drop_path"),
        (["--config.seed=1", "--config.optimizer.lr=3"], "no config key 'optimizer.lr'"),
    ],
)
def test_an_unknown_key_names_the_nearest(argv, message):
    with pytest.raises(UserError, match=message):
        check_command_line(["train.py", f"--config={CONFIGS / 'digits.py'}", *argv])


def test_a_missing_config_file_names_the_nearest():
    for flag in (["--config=configs/digit.py"], ["--config", "configs/digit.py"]):
        with pytest.raises(UserError, match=r"nearest: configs/digits\.py"):
            check_command_line(["train.py", *flag])


def test_known_keys_pass():
    check_command_line(
        ["train.py", f"--config={CONFIGS / 'digits.py'}", "--config.seed=3", "--workdir=x"]
    )
    check_command_line(["train.py"])


def test_a_tuple_survives_the_checkpoint():
    config = common.get_config()
    check_resumable(as_json(config), config, "runs/x")


def test_every_key_has_one_comment():
    lines = Path(defaults.__file__).read_text().splitlines()
    keys = [
        line for line in lines if line.strip().startswith("config.") and "ConfigDict()" not in line
    ]
    assert len(keys) == len(flatten(common.get_config()))
    assert [line for line in keys if "  # " not in line] == []


def test_no_key_goes_unread(tmp_path, monkeypatch):
    config = digits.get_config()
    config.epochs = 1 / 1437
    config.batch_size = 8
    config.model.depth = config.model.class_depth = 1
    config.model.width = 8
    config.model.num_heads = 1

    sections = {id(config): ""} | {
        id(value): f"{key}." for key, value in config.items() if isinstance(value, ConfigDict)
    }
    read = set()
    getattr_ = ConfigDict.__getattr__

    def watched(self, name):
        if id(self) in sections:
            read.add(sections[id(self)] + name)
        return getattr_(self, name)

    monkeypatch.setattr(ConfigDict, "__getattr__", watched)
    train(config, tmp_path)
    # The model's keys are arguments of create_model, which refuses one that it does not know.
    unread = {key for key in flatten(config) if not key.startswith("model.")} - read
    assert unread == set()
