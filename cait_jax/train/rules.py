"""What a value of a config may be: its type and range, in code and in words."""

import ast
import contextlib
import dataclasses
import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from cait_jax.errors import nearest

INT32 = 2**31 - 1
_FEW = 12  # words that a sentence lists
_TRUE, _FALSE = ("true", "t", "1", "yes", "y"), ("false", "f", "0", "no", "n")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rule(ABC):
    """What a value may be.

    Attributes:
      optional: None, too.
    """

    optional: bool = False

    @property
    @abstractmethod
    def wanted(self) -> str:
        """What a value must be, as the end of a sentence."""

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Whether a value that is not None is allowed."""

    @abstractmethod
    def read(self, text: str) -> Any:
        """The value that a command line has; `ValueError` for text that is of another type."""

    def hint(self, value: Any) -> str:
        """What is near a wrong value, to be added to the sentence."""
        del value
        return ""


@dataclasses.dataclass(frozen=True)
class Number(Rule):
    """A finite number in a range.

    Attributes:
      low: the least.
      high: the greatest.
      above: `low` is excluded.
      below: `high` is excluded.
      whole: integers only.
      also: a number outside the range.
    """

    low: int | float = -math.inf
    high: int | float = math.inf
    above: bool = False
    below: bool = False
    whole: bool = False
    also: int | None = None

    @property
    def wanted(self) -> str:
        """Such as `"a whole number from 1 to 1,024"`."""
        also = "" if self.also is None else f", or {self.also}"
        return f"{'a whole number' if self.whole else 'a finite number'}{self.range}{also}"

    @property
    def range(self) -> str:
        """The range alone, with a space before it."""
        if self.low == -math.inf:
            return ""
        low, high = _written(self.low), _written(self.high)
        if self.high == math.inf or (self.whole and self.high == INT32):
            return f" above {low}" if self.above else f" of {low} or more"
        if self.whole:
            return f" from {low} to {high}"
        if self.high > 1000:  # a comma among digits is none between ends
            return f"{' above' if self.above else ' of at least'} {low} and at most {high}"
        return f" in {'(' if self.above else '['}{low}, {high}{')' if self.below else ']'}"

    def fits(self, value: Any) -> bool:
        """Whether it is such a number; True and False are none."""
        kind = numbers.Integral if self.whole else numbers.Real
        if isinstance(value, bool) or not isinstance(value, kind):
            return False
        try:
            number = float(value)
        except OverflowError:  # an integer of more than 308 digits
            return False
        if not math.isfinite(number):
            return False
        over = number > self.low if self.above else number >= self.low
        under = number < self.high if self.below else number <= self.high
        return value == self.also or (over and under)

    def read(self, text: str) -> int | float:
        """The number."""
        return int(text) if self.whole else float(text)

    def hint(self, value: Any) -> str:
        """The upper end, where it is no more than what a computer can count to."""
        with contextlib.suppress(ValueError, TypeError):
            if self.whole and self.high == INT32 and int(value) > INT32:
                return f" and at most {INT32:,}"
        return ""


@dataclasses.dataclass(frozen=True)
class Numbers(Rule):
    """A tuple of numbers.

    Attributes:
      each: what each must be.
      counts: how many there may be.
      such_as: an example.
      increasing: none is less than the one before.
    """

    each: Number
    counts: tuple[int, ...]
    such_as: tuple[int | float, ...]
    increasing: bool = False

    @property
    def wanted(self) -> str:
        """Such as `"2 increasing numbers in (0, 1], such as 0.08,1"`."""
        count = " or ".join(str(count) for count in self.counts)
        increasing = " increasing" * self.increasing
        example = ",".join(f"{number:g}" for number in self.such_as)
        return f"{count}{increasing} finite numbers{self.each.range}, such as {example}"

    def fits(self, value: Any) -> bool:
        """Whether it is such a tuple."""
        if not isinstance(value, Sequence) or isinstance(value, str):
            return False
        return (
            len(value) in self.counts
            and all(map(self.each.fits, value))
            and not (self.increasing and list(value) != sorted(value))
        )

    def read(self, text: str) -> tuple[int | float, ...]:
        """The numbers, with or without brackets around them."""
        return tuple(self.each.read(part) for part in _parts(text))


@dataclasses.dataclass(frozen=True)
class Size(Rule):
    """A side in pixels, or (height, width)."""

    side: Number = Number(1, 2**14, whole=True)

    @property
    def wanted(self) -> str:
        """One side, or two."""
        return f"{self.side.wanted}, or height and width, such as 224,192"

    def fits(self, value: Any) -> bool:
        """Whether it is a side or two."""
        if isinstance(value, Sequence) and not isinstance(value, str):
            return len(value) == 2 and all(map(self.side.fits, value))
        return self.side.fits(value)

    def read(self, text: str) -> Any:
        """One side as a number, more as a tuple."""
        sides = tuple(int(part) for part in _parts(text))
        return sides[0] if len(sides) == 1 else sides


@dataclasses.dataclass(frozen=True)
class Words(Rule):
    """One of some words.

    Attributes:
      words: the words.
      number: a whole number, written as a word, is allowed too.
    """

    words: tuple[str, ...]
    number: Number | None = None

    @property
    def wanted(self) -> str:
        """The words, where they are few."""
        if len(self.words) > _FEW:
            return "a known name"
        number = f", or {self.number.wanted}" if self.number else ""
        return f"one of {', '.join(self.words)}{number}"

    def fits(self, value: Any) -> bool:
        """Whether it is one of them."""
        if not isinstance(value, str):
            return False
        with contextlib.suppress(ValueError):
            if self.number is not None and self.number.fits(int(value)):
                return True
        return value in self.words

    def read(self, text: str) -> str:
        """The word."""
        return text

    def hint(self, value: Any) -> str:
        """The nearest words, where some are near."""
        few = len(self.words) <= _FEW
        near = nearest(str(value), self.words, count=1 if few else 3)
        return "" if few and not near.startswith("nearest") else f"; {near}"


@dataclasses.dataclass(frozen=True)
class Text(Rule):
    """Any text, such as a name or a path."""

    @property
    def wanted(self) -> str:
        """Text."""
        return "text"

    def fits(self, value: Any) -> bool:
        """Whether it is text."""
        return isinstance(value, str)

    def read(self, text: str) -> str:
        """The text."""
        return text


@dataclasses.dataclass(frozen=True)
class Flag(Rule):
    """True or False."""

    @property
    def wanted(self) -> str:
        """One of the two."""
        return "True or False"

    def fits(self, value: Any) -> bool:
        """Whether it is one of the two."""
        return isinstance(value, bool)

    def read(self, text: str) -> bool:
        """True or False, as absl's flags have it."""
        if text.lower() not in _TRUE + _FALSE:
            raise ValueError(text)
        return text.lower() in _TRUE


def _written(number: int | float) -> str:
    return f"{int(number):,}" if math.isfinite(number) and number == int(number) else f"{number:g}"


def _parts(text: str) -> list[str]:
    """`"(1, 2)"`, `"[1,2]"` and `"1,2"` in parts."""
    with contextlib.suppress(SyntaxError, ValueError):
        value = ast.literal_eval(text)
        return [str(part) for part in (value if isinstance(value, tuple | list) else (value,))]
    return text.split(",")  # nan and inf are no literals of Python
