"""The values of config keys that a sweep tries, and the run that each combination is."""

import dataclasses
import hashlib
import itertools
import re
from collections.abc import Mapping
from typing import Any

from cait_jax.errors import UserError, nearest
from cait_jax.files import run_folder_name, to_json
from cait_jax.renamed import OLD_KEYS
from cait_jax.train.config import as_json, check_values, flatten, load_config, read
from cait_jax.train.keys import KEYS, Number, Several, Size
from cait_jax.train.resume import is_free

SEED = "seed"
_LONGEST_NAME = 100
_DIGITS = 4  # of a number drawn from a range


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """A run of a recipe.

    Attributes:
      name: of its workdir: the values that vary, and the first digits of the `digest`.
      overrides: config keys to texts.
      config: its resolved config, flat, without keys that change no number.
      digest: SHA-256 of `config`, by which a run is known.
    """

    name: str
    overrides: Mapping[str, str]
    config: Mapping[str, Any]
    digest: str


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included; `log`: evenly over the logarithm."""

    low: int | float
    high: int | float
    log: bool
    whole: bool

    def text(self, value: int | float) -> str:
        """A number of the range in a few digits, as a command line has it."""
        if self.whole:
            return str(int(value))
        short = f"{value:.{_DIGITS}g}"
        return short if self.low <= float(short) <= self.high else repr(value)


def parse(settings: Mapping[str, str]) -> dict[str, list[str] | Range]:
    """The values of each key: those between commas (semicolons, where a value has commas itself), or a range.

    A range is `LOW..HIGH`, or `LOW..HIGH:log`, of a key that is a number.

    Raises:
      UserError: there is no such key, a range that is none, or a value twice.
    """
    found: dict[str, list[str] | Range] = {}
    for name, text in settings.items():
        key = KEYS.get(OLD_KEYS.get(name, name))
        if key is None:
            raise UserError(f"there is no config key {name!r}; {nearest(name, KEYS)}")
        if isinstance(key.kind, Number) and ".." in text:
            found[name] = _range(name, text, key.kind.whole)
            continue
        found[name] = texts = text.split(";" if isinstance(key.kind, Several | Size) else ",")
        if twice := [each for each in texts if texts.count(each) > 1]:
            raise UserError(f"--config.{name} has {twice[0]!r} twice: give each value once")
    return found


def _range(name: str, text: str, whole: bool) -> Range:
    low, _, high = text.partition("..")
    high, *log = high.split(":")
    try:
        ends = [read(Number(whole=whole), end) for end in (low, high)]
    except ValueError:
        ends = []
    if not ends or log not in ([], ["log"]):
        number = "1..8" if whole else "1e-4..1e-2"
        raise UserError(
            f"--config.{name}={text} is no range: give one such as {number} or {number}:log"
        )
    if not ends[0] < ends[1]:
        raise UserError(
            f"--config.{name}={text} ends where it begins or before: give the lesser number first"
        )
    if log and ends[0] <= 0:
        raise UserError(
            f"--config.{name}={text} has no logarithm: begin above 0, or leave out :log"
        )
    return Range(ends[0], ends[1], bool(log), whole)


def grid(file: str, values: Mapping[str, list[str]]) -> list[SweepRun]:
    """The runs of a recipe with every combination of values, the last key varying fastest.

    Raises:
      UserError: the recipe or a value cannot be had, nothing varies, or two runs are the same.
    """
    varied = [name for name, texts in values.items() if len(texts) > 1]
    if not varied:
        raise UserError(
            "nothing varies: give several values of a key, such as --config.optimizer.learning_rate=1e-3,3e-4"
        )
    runs: dict[str, SweepRun] = {}
    for texts in itertools.product(*values.values()):
        run = resolve(file, dict(zip(values, texts, strict=True)), varied)
        if same := runs.get(run.digest):
            name = next(name for name in varied if run.overrides[name] != same.overrides[name])
            raise UserError(
                f"--config.{name}: {same.overrides[name]} and {run.overrides[name]} are the same run: give one"
            )
        runs[run.digest] = run
    return list(runs.values())


def resolve(file: str, overrides: Mapping[str, str], varied: list[str]) -> SweepRun:
    """The run of a recipe with some overrides, named by those in `varied`.

    Raises:
      UserError: the recipe cannot be had, or a value or combination of values is none that a run could use.
    """
    loaded = load_config(file, overrides)
    check_values(loaded)
    flat = flatten(as_json(loaded))
    config = {key: value for key, value in flat.items() if key in varied or not is_free(key)}
    short = [name.rpartition(".")[2] for name in varied]
    parts = [
        f"{name if short.count(last) > 1 else last}={overrides[name]}"
        for name, last in zip(varied, short, strict=True)
    ]
    digest = hashlib.sha256(to_json(dict(sorted(config.items()))).encode()).hexdigest()
    name = run_folder_name(re.sub(r"[/\\\s]", "-", "_".join(parts)))[:_LONGEST_NAME]
    return SweepRun(f"{name}-{digest[:8]}", dict(overrides), config, digest)
