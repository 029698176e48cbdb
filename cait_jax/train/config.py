"""Checks of a config: unknown keys, and differences from the config a run was started with."""

import inspect
import json
import re
import runpy
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import UserError, nearest
from cait_jax.train.conflicts import check_conflicts

# What may change between the start of a run and its resumption: it changes no number of the run.
FREE_KEYS = ("report", "mesh", "data.data_dir", "data.workers")

# What values make sense, as a sentence says it.
_RANGES: dict[str, tuple[Callable[[Any], bool], tuple[str, ...]]] = {
    "at least 1": (
        lambda value: value >= 1,
        (
            "batch_size",
            "steps",
            "optimizer.accumulate",
            "eval.batch_size",
            "checkpoint.every_steps",
            "checkpoint.keep",
            "report.every_steps",
            "data.repeats",
        ),
    ),
    "more than 0": (
        lambda value: value > 0,
        (
            "epochs",
            "eval.every_epochs",
            "optimizer.decay_epochs",
            "optimizer.eps",
            "distill.temperature",
        ),
    ),
    "0 or more": (
        lambda value: value >= 0,
        (
            "data.workers",
            "augment.pad_crop",
            "optimizer.learning_rate",
            "optimizer.reference_batch",
            "optimizer.warmup_epochs",
            "optimizer.weight_decay",
            "optimizer.clip_norm",
            "optimizer.sharpness_radius",
            "optimizer.momentum",
            "phases.head_epochs",
            "phases.blocks_epochs",
            "augment.color_jitter",
        ),
    ),
    "in [0, 1)": (
        lambda value: 0 <= value < 1,
        (
            "loss.label_smoothing",
            "optimizer.b1",
            "optimizer.b2",
            "optimizer.ema_decay",
        ),
    ),
    "in (0, 1]": (
        lambda value: 0 < value <= 1,
        ("eval.crop_ratio", "optimizer.layer_decay", "optimizer.decay_rate"),
    ),
    "in [0, 1]": (lambda value: 0 <= value <= 1, ("augment.erase", "distill.weight")),
    "two increasing numbers in (0, 1]": (
        lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1] <= 1,
        ("augment.crop_area",),
    ),
    "two increasing numbers above 0": (
        lambda pair: len(pair) == 2 and 0 < pair[0] <= pair[1],
        ("augment.crop_aspect",),
    ),
}

_CONFIG_FLAG = re.compile(r"^--?config[=\n](?P<path>.+)$", re.MULTILINE)
_OVERRIDE_FLAG = re.compile(r"--?config\.(?P<key>[^=]+)")


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Gives nested keys with dots between them: `{"model": {"name": "x"}}` to `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: tuples become lists."""
    return json.loads(json.dumps(config.to_dict()))


def check_overrides(config: ConfigDict, keys: Iterable[str]) -> None:
    """Refuses overrides of keys that the config does not have.

    Args:
      config: the config they override.
      keys: dotted keys, such as `model.drop_path`.

    Raises:
      UserError: naming the first unknown key and the nearest known ones.
    """
    known = flatten(config)
    for key in keys:
        if key not in known:
            raise UserError(f"there is no config key {key!r}; {nearest(key, known)}")


def check_values(config: ConfigDict) -> None:
    """Refuses values that no run could use, and those that exclude each other.

    Args:
      config: as `cait_jax/train/defaults.py` describes it.

    Raises:
      UserError: naming the key, its value and what it must be, or the keys that exclude each other.
    """
    flat = flatten(config)
    for wanted, (holds, keys) in _RANGES.items():
        for key in keys:
            if flat[key] is not None and not holds(flat[key]):
                raise UserError(f"--config.{key} is {flat[key]} and must be {wanted}")
    check_conflicts(flat)


def check_resumable(saved: Mapping[str, Any], current: ConfigDict, workdir: str) -> None:
    """Refuses to resume a run under settings that would make it another run.

    Args:
      saved: the config in the run's checkpoint, as `as_json` gave it.
      current: the config now.
      workdir: of the run.

    Raises:
      UserError: listing every key that differs, with both values.
    """
    before, now = flatten(saved), flatten(as_json(current))
    changed = [
        f"{key} was {before.get(key)!r} and is now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    if changed:
        raise UserError(
            f"the run in {workdir} was started with other settings: {'; '.join(changed)}: take them back "
            "to resume it, or give another --workdir to start anew"
        )


def check_command_line(argv: Sequence[str]) -> None:
    """Refuses a command line whose config file, its argument or overridden keys do not do.

    Args:
      argv: such as `["train.py", "--config=configs/digits.py", "--config.seed=1"]`. What follows a colon, as in
        `--config=configs/folder.py:photographs`, is the argument of the file's `get_config`.

    Raises:
      UserError: naming the nearest file or keys that exist; or what `get_config` says of its argument.
    """
    found = _CONFIG_FLAG.search("\n".join(argv))
    if found is not None:
        overrides = [match["key"] for arg in argv if (match := _OVERRIDE_FLAG.match(arg))]
        check_overrides(load_config(found["path"]), overrides)


def load_config(file: str) -> ConfigDict:
    """What a config file's `get_config` gives.

    Args:
      file: its path; what follows a colon is the argument of `get_config`.

    Raises:
      UserError: there is no such file, or it takes no argument; or what `get_config` says of it.
    """
    name, colon, argument = file.partition(":")
    path = Path(name)
    if not path.is_file():
        known = [str(file) for file in sorted(path.parent.glob("*.py")) if file.stem[0] != "_"]
        raise UserError(f"there is no config file {path}; {nearest(str(path), known)}")
    get_config = runpy.run_path(str(path))["get_config"]
    if colon and not inspect.signature(get_config).parameters:
        raise UserError(f"{path} takes no argument: leave out {colon + argument!r}")
    return get_config(argument) if colon else get_config()
