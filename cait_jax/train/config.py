"""Configs: loaded from a file, overridden by a command line, checked by the table of `keys`."""

import ast
import contextlib
import hashlib
import inspect
import json
import math
import re
import runpy
import sys
import traceback
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, NamedTuple

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from cait_jax.errors import UserError, nearest, one_line, some
from cait_jax.reading import MAX_TEXT, check_regular
from cait_jax.renamed import MEANT_BEFORE, OLD_KEYS, OLD_VALUES, current_file, renamed_in
from cait_jax.train.conflicts import CONFLICTS
from cait_jax.train.keys import KEYS, Kind, Name, Number, Several, Size, Words, misfit

_FILE = re.compile(r"--?config(=(?P<path>.*))?")
_OVERRIDE = re.compile(r"--?(?P<no>no)?config\.(?P<key>[^=]+)(=(?P<text>.*))?", re.DOTALL)


_FLAGS = {
    **dict.fromkeys(("true", "t", "1", "yes", "y"), True),
    **dict.fromkeys(("false", "f", "0", "no", "n"), False),
}


class CommandLine(NamedTuple):
    """A config file with its argument, the text for each key that is set, and the remaining arguments."""

    file: str | None
    overrides: dict[str, str]
    rest: list[str]


def get_config() -> ConfigDict:
    """The defaults, locked: a key that is not in the table cannot be set."""
    config = ConfigDict()
    for name, key in KEYS.items():
        section, _, last = name.rpartition(".")
        if section and section not in config:
            config[section] = ConfigDict()
        values = config[section] if section else config
        values[last] = placeholder(_type(key.kind)) if key.default is None else key.default
    return config.lock()


def parse_command_line(argv: Sequence[str]) -> CommandLine:
    """Parses `--config=FILE`, `--config.KEY=VALUE`, `--config.KEY VALUE`, and `--[no]config.KEY` of a flag."""
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
            key, text = OLD_KEYS.get(found["key"], found["key"]), found["text"]
            if text is None and (found["no"] or (key in KEYS and KEYS[key].kind is bool)):
                text = "false" if found["no"] else "true"
            elif text is None and arguments:
                text = arguments.pop(0)
            overrides.pop(key, None)
            overrides[key] = text or ""
        else:
            rest.append(argument)
    return CommandLine(file, overrides, rest)


def load_config(file: str, overrides: Mapping[str, str] | None = None) -> ConfigDict:
    """The config of a file's `get_config`, with keys set to a command line's texts.

    Args:
      file: its path, and after a colon the argument of `get_config`. It may import `configs.common`.
      overrides: dotted key, such as `model.depth`, to text.

    Raises:
      UserError: there is no such file, it fails or refuses its argument, or a key or value does not exist.
    """
    name, _, argument = file.partition(":")
    path = Path(name)
    if not path.exists() or path.is_dir():
        if now := current_file(path):
            raise UserError(
                f"there is no config file {path} any more: its recipe is --config={now}"
            )
        known = [str(file) for file in sorted(path.parent.glob("*.py")) if file.stem[0] != "_"]
        raise UserError(f"there is no config file {path}; {nearest(str(path), known)}")
    try:
        check_regular(path, MAX_TEXT)
    except OSError as error:
        raise UserError(
            f"config file {path} cannot be read: {error.strerror}; give a file such as configs/digits.py"
        ) from error
    sys.path.insert(0, str(path.absolute().parent.parent))
    try:
        get_config = runpy.run_path(str(path)).get("get_config")
        if get_config is None:
            raise UserError(f"{path} has no get_config: define one that returns the config")
        parameters = list(inspect.signature(get_config).parameters.values())
        if argument and not parameters:
            raise UserError(f"{path} takes no argument: leave out {':' + argument!r}")
        if not argument and parameters and parameters[0].default is inspect.Parameter.empty:
            wanted = parameters[0].name.upper()
            raise UserError(f"{path} takes an argument: give --config={path}:{wanted}")
        config = get_config(argument) if argument else get_config()
    except (UserError, KeyboardInterrupt):
        raise
    except BaseException as error:  # it may call sys.exit
        raise UserError(_failure(path, error)) from error
    finally:
        sys.path.pop(0)
    try:
        check_keys(config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    return override(config, overrides or {})


def check_argument(name: str, argument: str, known: Sequence[str]) -> None:
    """Refuses an argument that the config file `name` does not take; `""` stands for none."""
    if argument not in known:
        ways = [f":{way}" if way else "no argument" for way in known]
        given = f"not :{argument}" if argument else "and needs one of them"
        raise UserError(f"{name}.py takes {', '.join(ways[:-1])} or {ways[-1]}, {given}")


def default_workdir(file: str) -> Path:
    """The default directory of a run by a config file: `runs/STEM` or `runs/STEM-ARGUMENT`.

    No two arguments share one, on any file system: where a slug of lower-case letters, digits, `,`, `_` and `-`
    loses something, the first digits of the argument's SHA-256 follow. A slash at the end does not count.
    """
    name, _, argument = file.partition(":")
    argument = argument.rstrip("/") or argument
    slug = re.sub(r"[^a-z0-9_,]+", "-", argument.lower())[-40:].strip("-")
    parts = [Path(name).stem, slug]
    if slug != argument or re.search(r"(^|-)[0-9a-f]{8}$", slug):
        parts.append(hashlib.sha256(argument.encode(errors="surrogateescape")).hexdigest()[:8])
    return Path("runs") / "-".join(filter(None, parts))


def _failure(path: Path, error: BaseException) -> str:
    """Where a config file fails, and why."""
    lines = [
        frame.lineno
        for frame in traceback.extract_tb(error.__traceback__)
        if Path(frame.filename).absolute() == path.absolute()
    ]
    line = error.lineno if isinstance(error, SyntaxError) else (lines or [None])[-1]
    where = f"{path}, line {line}" if line else str(path)
    reason = error.msg if isinstance(error, SyntaxError) else error
    hint = renamed_in(str(error)) if isinstance(error, AttributeError | KeyError) else ""
    return f"{where}: {type(error).__name__}: {one_line(str(reason))}{hint}"


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets keys of `config` to the texts of a command line, in place; refuses unknown keys and unfit values."""
    for given, text in overrides.items():
        key = OLD_KEYS.get(given, given)
        if key not in KEYS:
            raise UserError(f"there is no config key {key!r}; {nearest(key, KEYS)}")
        kind, value = KEYS[key].kind, None
        if KEYS[key].default is not None or text.lower() != "none":
            try:
                value = read(kind, OLD_VALUES.get((key, text), text))
            except (KeyError, ValueError):
                raise misfit(key, text) from None
            if not fits(kind, value):
                raise misfit(key, text)
        section, _, last = key.rpartition(".")
        with config.ignore_type():  # a size is a number or two
            (config[section] if section else config)[last] = value
    return config


def _type(kind: Kind) -> type:
    if isinstance(kind, Number):
        return int if kind.whole else float
    return (
        kind
        if isinstance(kind, type)
        else {Several: tuple, Size: int, Words: str, Name: str}[type(kind)]
    )


def read(kind: Kind, text: str) -> Any:
    """The value of a command line's text; `ValueError` or `KeyError` for text of another kind."""
    match kind:
        case Number():
            return int(text) if kind.whole else float(text)
        case Several():
            return tuple(read(kind.each, part) for part in _parts(text))
        case Size():
            sides = read(kind.both, text)
            return sides[0] if len(sides) == 1 else sides
    return text if kind is not bool else _FLAGS[text.lower()]


def _parts(text: str) -> list[str]:
    """`"(1, 2)"`, `"[1,2]"` and `"1,2"` in parts."""
    with contextlib.suppress(SyntaxError, ValueError):
        value = ast.literal_eval(text)
        return [str(part) for part in (value if isinstance(value, tuple | list) else (value,))]
    return text.split(",")  # nan and inf are no literals of Python


def fits(kind: Kind, value: Any) -> bool:
    """Whether a value that is not None is of a kind."""
    match kind:
        case Number():
            if isinstance(value, bool) or not isinstance(value, Integral if kind.whole else Real):
                return False
            try:
                x = float(value)
            except OverflowError:  # an integer of more than 308 digits
                return False
            above = x > kind.low if kind.above else x >= kind.low
            below = x < kind.high if kind.below else x <= kind.high
            return math.isfinite(x) and (x == kind.also or (above and below))
        case Several():
            return (
                isinstance(value, list | tuple)
                and len(value) in kind.counts
                and all(fits(kind.each, member) for member in value)
                and not (kind.increasing and list(value) != sorted(value))
            )
        case Size():
            return fits(kind.side, value) or fits(kind.both, value)
        case Words():
            with contextlib.suppress(ValueError):
                if kind.count and isinstance(value, str) and fits(kind.count, int(value)):
                    return True
            return isinstance(value, str) and value in kind.known
        case Name():
            return isinstance(value, str) and bool(value.strip())
    return isinstance(value, kind)


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots between them: `{"model": {"name": "x"}}` to `{"model.name": "x"}`."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def with_missing(saved: Mapping[str, Any]) -> dict[str, Any]:
    """A saved run's flat config, where a key that is younger than the run has the value that it meant then."""
    return {**flatten(as_json(get_config())), **MEANT_BEFORE, **saved}


def as_json(config: ConfigDict) -> dict[str, Any]:
    """The config as JSON gives it back: tuples become lists."""
    read_back: dict[str, Any] = json.loads(json.dumps(config.to_dict(), allow_nan=False))
    return read_back


def check_keys(config: Any) -> None:
    """Refuses what is not a `ConfigDict` with exactly the keys of the table, naming missing or unknown ones."""
    start = "start from configs.common.get_config()"
    if not isinstance(config, ConfigDict):
        raise UserError(f"the config is a {type(config).__name__}, not a ConfigDict: {start}")
    try:
        known = flatten(config).keys()
    except TypeError as error:  # keys of several types cannot be put in order
        raise UserError(f"the config has a key that is no text: {start}") from error
    if missing := sorted(KEYS.keys() - known):
        raise UserError(f"the config lacks {some(missing)}: {start}")
    if unknown := sorted(known - KEYS.keys()):
        raise UserError(f"there is no config key {unknown[0]!r}; {nearest(unknown[0], KEYS)}")


def check_values(config: ConfigDict) -> None:
    """Refuses keys, values and combinations of values that no run could use."""
    check_keys(config)
    flat = flatten(config)
    for name, key in KEYS.items():
        if not (key.default is None if flat[name] is None else fits(key.kind, flat[name])):
            raise misfit(name, flat[name])
    for excluded, sentence in CONFLICTS:
        if excluded(flat):
            raise UserError(sentence)
