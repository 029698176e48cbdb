"""A setting is written as the user of each interface writes it, or not named at all."""

import pytest

from cait_jax.interface import (
    KEY_OF,
    Literal,
    Way,
    advise,
    can_set,
    flags,
    in_python,
    options,
    setting,
    speaking,
)
from cait_jax.train.defaults import get_config

COMMAND = options(
    {"epochs": "--epochs", "ema": "--ema", "name_or_path": "--model"}, frozenset({"ema"})
)


@pytest.mark.parametrize(
    ("name", "value", "python", "train", "command"),
    [
        ("reset_head", True, "reset_head=True", "--config.init.reset_head=True", "reset head"),
        ("num_classes", 3, "num_classes=3", "num classes", "num classes"),
        ("config.epochs", 2.0, "--config.epochs=2.0", "--config.epochs=2.0", "--epochs 2.0"),
        ("ema", True, "ema=True", "--config.init.ema=True", "--ema"),
        ("config.mesh.data", -1, "--config.mesh.data=-1", "--config.mesh.data=-1", "data"),
        (
            "name_or_path", Literal("NAME"), "name_or_path=NAME", "--config.model.name=NAME",
            "--model NAME",
        ),
    ],
)  # fmt: skip
def test_a_setting_in_each_interface(name, value, python, train, command):
    assert (setting(name, value), in_python()) == (python, True)
    with speaking(flags):
        assert (setting(name, value), in_python()) == (train, False)
        with speaking(COMMAND):
            assert setting(name, value) == command
        assert setting(name, value) == train


def test_only_ways_that_are_open_are_advised():
    ways = Way("give {} to start anew", "reset_head", True), Way("{} to keep it", "num_classes", 3)
    assert advise(*ways) == "give reset_head=True to start anew, or num_classes=3 to keep it"
    with speaking(flags):
        assert advise(*ways) == "give --config.init.reset_head=True to start anew"
    with speaking(COMMAND):
        assert (advise(*ways), advise(*ways, otherwise="choose others")) == ("", "choose others")
        assert advise(*ways, "choose others") == "choose others"
        assert can_set("epochs")
        assert not can_set("reset_head")


def test_the_interface_ends_with_an_error():
    with pytest.raises(KeyError), speaking(flags):
        raise KeyError
    assert in_python()


def test_the_keys_exist():
    known = set(get_config().model) | {"projection_dropout"}
    for name, key in KEY_OF.items():
        section = key.removeprefix("config.")
        if section.startswith("model."):
            assert section.removeprefix("model.") in known, name
        else:
            assert get_config()[section.partition(".")[0]] is not None
