"""How a setting is written where the user gives it: as an argument in Python, a flag of `train.py`, an option.

Messages name settings by `setting` and `advise`, so that the same error reads `reset_head=True` in Python,
`--config.init.reset_head=True` under `train.py`, and in a command names an option only if the command has it.

A setting is an argument of the Python API (`"reset_head"`) or a config key (`"config.optimizer.learning_rate"`).
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

CONFIG = "config."
_OF_MODEL = (
    "width", "depth", "num_heads", "patch_size", "mlp_ratio", "residual", "block_norm", "layer_scale_init",
    "talking_heads", "class_token", "class_depth", "class_mlp_ratio", "distilled", "drop_path_rate",
    "drop_path_growth", "embedding_dropout", "attention_dropout", "projection_dropout", "dropout", "dtype",
    "param_dtype", "precision", "remat", "attention", "stacked",
)  # fmt: skip
# Arguments of the Python API that a config has as well, and the key there.
KEY_OF: Mapping[str, str] = {
    "name_or_path": "config.model.name",
    "weights": "config.init.weights",
    "reset_head": "config.init.reset_head",
    "ema": "config.init.ema",
    "image_size": "config.image_size",
    "seed": "config.seed",
    "epochs": "config.epochs",
    "batch_size": "config.batch_size",
    "data_dir": "config.data.data_dir",
    "workers": "config.data.workers",
    **{name: f"config.model.{name}" for name in _OF_MODEL},
}

_ANY = object()
# From a setting and its value (`_ANY`: none in particular) to how it is written; None where it cannot be set.
Interface = Callable[[str, Any], str | None]


@dataclasses.dataclass(frozen=True)
class Literal:
    """A value that stands for what the user fills in, such as `PATH`."""

    text: str

    def __repr__(self) -> str:
        """The text, without quotes."""
        return self.text


@dataclasses.dataclass(frozen=True)
class Way:
    """One way out of an error.

    Attributes:
      text: with `{}` where the setting goes, such as `"give {} to start the head anew"`.
      setting: an argument or a config key.
      value: to set it to; if not given, the setting alone is named.
    """

    text: str
    setting: str
    value: Any = _ANY

    def __str__(self) -> str:
        """The text with the setting in it, as the user writes it."""
        return self.text.format(setting(self.setting, self.value))


def python(name: str, value: Any) -> str | None:
    """`name=value`. Config keys are written as `train.py` has them."""
    if name.startswith(CONFIG):
        return flags(name, value)
    return name if value is _ANY else f"{name}={value!r}"


def flags(name: str, value: Any) -> str | None:
    """`--config.KEY=VALUE`, of `train.py` and `cait plan`."""
    name = KEY_OF.get(name, name)
    if not name.startswith(CONFIG):
        return None
    return f"--{name}" if value is _ANY else f"--{name}={value}"


def options(of_setting: Mapping[str, str], flag_names: frozenset[str] = frozenset()) -> Interface:
    """The options of a command.

    Args:
      of_setting: argument to option, such as `{"image_size": "--image-size"}`.
      flag_names: the arguments whose option takes no value.
    """
    argument_of = {key: argument for argument, key in KEY_OF.items()}

    def written(name: str, value: Any) -> str | None:
        argument = argument_of.get(name, name)
        option = of_setting.get(argument)
        if option is None or value is _ANY or argument in flag_names:
            return option
        return f"{option} {value}"

    return written


_current: Interface = python


@contextlib.contextmanager
def speaking(interface: Interface) -> Iterator[None]:
    """Inside, messages are for the users of `interface`. Of the whole process: threads raise errors as well."""
    global _current
    before, _current = _current, interface
    try:
        yield
    finally:
        _current = before


def setting(name: str, value: Any = _ANY) -> str:
    """How the user writes a setting; where it cannot be set, its name in words."""
    return _current(name, value) or name.rpartition(".")[2].replace("_", " ")


def in_python() -> bool:
    """Whether the user calls the Python API."""
    return _current is python


def can_set(name: str) -> bool:
    """Whether the user has this setting."""
    return _current(name, _ANY) is not None


def advise(*ways: Way | str, otherwise: str = "") -> str:
    """The ways out that the user has, joined by "or".

    Args:
      *ways: a string is open to everybody.
      otherwise: what is said if there is none.
    """
    open_ways = [str(way) for way in ways if isinstance(way, str) or can_set(way.setting)]
    return ", or ".join(open_ways) or otherwise
