"""A config from its file and a command line, its check, and its differences from that of a run begun earlier."""

import dataclasses
import hashlib
import inspect
import json
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from cait_jax.errors import UserError, can_set, nearest, setting, some
from cait_jax.renamed import KEYS, current_config, current_file
from cait_jax.train.conflicts import check_conflicts
from cait_jax.train.keys import RULES
from cait_jax.train.rules import Flag

# What may change between the start of a run and its resumption: it changes no number of the run.
FREE_KEYS = ("report", "mesh", "data.data_dir", "data.workers")

_FILE = re.compile(r"--?config(=(?P<path>.*))?")
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<text>.*))?", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """A command line taken apart.

    Attributes:
      file: the config file, with its argument after a colon; None if none is given.
      overrides: config key to the text it is set to, in their order.
      rest: what else there is, in its order.
    """

    file: str | None
    overrides: dict[str, str]
    rest: list[str]


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
    return json.loads(json.dumps(config.to_dict(), allow_nan=False))


def take_apart(argv: Sequence[str]) -> CommandLine:
    """Splits a command line into config file, overrides of its keys, and everything else.

    Args:
      argv: such as `["--config=configs/digits.py", "--config.seed=1", "--workdir=x"]`. A value may also be the
        argument after its key; `--config.KEY` and `--noconfig.KEY` set a key that is True or False.
    """
    file: str | None = None
    overrides: dict[str, str] = {}
    rest: list[str] = []
    arguments = list(argv)
    while arguments:
        argument = arguments.pop(0)
        if argument == "--":
            rest += [argument, *arguments]
            break
        if found := _FILE.fullmatch(argument):
            file = found["path"]
            if file is None and arguments:
                file = arguments.pop(0)
        elif found := _OVERRIDE.fullmatch(argument):
            key, text = KEYS.get(found["key"], found["key"]), found["text"]
            if text is None and (found["no"] or isinstance(RULES.get(key), Flag)):
                text = "false" if found["no"] else "true"
            elif text is None and arguments:
                text = arguments.pop(0)
            overrides.pop(key, None)
            overrides[key] = text or ""
        else:
            rest.append(argument)
    return CommandLine(file, overrides, rest)


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets keys of a config to what a command line says.

    Args:
      config: is changed.
      overrides: dotted key, such as `model.drop_path_rate`, to text.

    Returns:
      The config.

    Raises:
      UserError: naming the first key that does not exist and the nearest known ones, or the first value that no
        run could use and what it must be.
    """
    known = flatten(config)
    for given, text in overrides.items():
        key = KEYS.get(given, given)
        if key not in known:
            raise UserError(f"there is no config key {key!r}; {nearest(key, known)}")
        rule, value = RULES[key], None
        if not rule.optional or text.lower() != "none":
            try:
                value = rule.read(text)
                readable = rule.fits(value)
            except ValueError:
                readable = False
            if not readable:
                raise _wrong(key, text)
        *path, last = key.split(".")
        section = config
        for name in path:
            section = section[name]
        with config.ignore_type():  # a size is a number or two
            section[last] = value
    return config


def check_keys(config: Any) -> None:
    """Refuses what is not a config with exactly the keys of `cait_jax/train/defaults.py`.

    Args:
      config: what `get_config` returned.

    Raises:
      UserError: it is of another type, or naming the keys that are missing or unknown.
    """
    start = "start from configs.common.get_config()"
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config is a {type(config).__name__}, not a ConfigDict: {start}")
    known = flatten(config).keys()
    if missing := sorted(RULES.keys() - known):
        raise UserError(f"the config lacks {some(missing)}: {start}")
    if unknown := sorted(known - RULES.keys()):
        raise UserError(f"there is no config key {unknown[0]!r}; {nearest(unknown[0], RULES)}")


def check_values(config: ConfigDict) -> None:
    """Refuses values that no run could use, by `RULES`, and those that exclude each other.

    Args:
      config: as `cait_jax/train/defaults.py` describes it.

    Raises:
      UserError: naming the key, its value and what it must be, or the keys that exclude each other.
    """
    check_keys(config)
    flat = flatten(config)
    for key, rule in RULES.items():
        if not (rule.optional if flat[key] is None else rule.fits(flat[key])):
            raise _wrong(key, flat[key])
    check_conflicts(flat)


def _wrong(key: str, value: Any) -> UserError:
    rule = RULES[key]
    shown = repr(value) if value == "" else str(value)
    none = ", or None" if rule.optional else ""
    return UserError(
        f"{setting(f'config.{key}')} is {shown} and must be {rule.wanted}{none}{rule.hint(value)}"
    )


def check_resumable(saved: Mapping[str, Any], current: ConfigDict, workdir: str) -> None:
    """Refuses to resume a run under settings that would make it another run.

    Args:
      saved: the config in the run's checkpoint, as `as_json` gave it; keys may have their old names.
      current: the config now.
      workdir: of the run.

    Raises:
      UserError: listing every key that differs, with both values.
    """
    before, now = flatten(current_config(saved)), flatten(as_json(current))
    changed = [
        key
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
        and not any(key == free or key.startswith(f"{free}.") for free in FREE_KEYS)
    ]
    # Of a command that has options for some, the others follow from these.
    own = [key for key in changed if can_set(f"config.{key}")] or changed
    clauses = [f"{_bare(key)} was {before.get(key)!r} and is now {now.get(key)!r}" for key in own]
    if changed:
        raise UserError(
            f"the run in {workdir} was started with other settings: {'; '.join(clauses)}: take them back "
            "to resume it, or give another --workdir to start anew"
        )


def _bare(key: str) -> str:
    """The key where it is how the user sets it, else the command's option."""
    written = setting(f"config.{key}")
    return key if written == f"--config.{key}" or not written.startswith("-") else written


def load_config(file: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """What a config file's `get_config` gives, with keys set to what a command line says.

    Args:
      file: its path; what follows a colon is the argument of `get_config`. It may import what the folder above its
        own holds, such as `configs.common`.
      overrides: dotted key to text.

    Raises:
      UserError: there is no such file, it fails, or it takes no argument; or what `get_config` says of it; or a
        key or value does not exist.
    """
    name, _, argument = file.partition(":")
    path = Path(name)
    if not path.is_file():
        if now := current_file(path):
            raise UserError(
                f"there is no config file {path} any more: its recipe is --config={now}"
            )
        known = [str(file) for file in sorted(path.parent.glob("*.py")) if file.stem[0] != "_"]
        raise UserError(f"there is no config file {path}; {nearest(str(path), known)}")
    sys.path.insert(0, str(path.absolute().parent.parent))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no get_config: define one that returns the config")
        parameters = list(inspect.signature(get_config).parameters.values())
        if argument and not parameters:
            raise UserError(f"{path} takes no argument: leave out {':' + argument!r}")
        if not argument and parameters and parameters[0].default is inspect.Parameter.empty:
            raise UserError(
                f"{path} takes an argument: give --config={path}:{parameters[0].name.upper()}"
            )
        config = get_config(argument) if argument else get_config()
    except UserError:
        raise
    except Exception as error:
        raise UserError(_failure(path, error)) from error
    finally:
        sys.path.pop(0)
    try:
        check_keys(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return override(config, overrides or {})


def check_argument(name: str, argument: str, known: Sequence[str]) -> None:
    """Refuses what a config file does not take after its colon.

    Args:
      name: of the file, without `.py`.
      argument: what was given; `""` for nothing.
      known: what it takes, with `""` if it can do without.

    Raises:
      UserError: listing what it takes.
    """
    if argument not in known:
        ways = [f":{way}" if way else "no argument" for way in known]
        given = f"not :{argument}" if argument else "and needs one of them"
        raise UserError(f"{name}.py takes {', '.join(ways[:-1])} or {ways[-1]}, {given}")


def default_workdir(file: str) -> Path:
    """The directory of a run whose user names none: `runs/STEM` or `runs/STEM-ARGUMENT`.

    No two arguments share one, on any file system: what is no lower-case letter, digit, comma or `_` becomes `-`,
    and where that loses something, the first digits of the argument's SHA-256 follow.

    Args:
      file: as for `load_config`, such as `configs/cait_xs24.py:384`. A slash at its end does not count.
    """
    name, _, argument = file.partition(":")
    argument = argument.rstrip("/") or argument
    plain = re.sub(r"[^a-z0-9_,]+", "-", argument.lower())[-40:].strip("-")
    parts = [Path(name).stem, plain]
    if plain != argument or re.search(r"(^|-)[0-9a-f]{8}$", argument):
        digest = hashlib.sha256(argument.encode(errors="surrogateescape")).hexdigest()
        parts.append(digest[:8])
    return Path("runs") / "-".join(filter(None, parts))


def _failure(path: Path, error: Exception) -> str:
    """Where a config file fails, and why."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == path.absolute()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"{path}, line {line}" if line else str(path)
    reason = error.msg if isinstance(error, SyntaxError) else error
    return f"{where}: {type(error).__name__}: {' '.join(str(reason).split())}"
