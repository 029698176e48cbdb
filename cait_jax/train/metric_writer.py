"""What a run tells: `metrics.jsonl`, a bar on a terminal or lines in a log, TensorBoard."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, SupportsFloat, runtime_checkable

from tqdm import tqdm

from cait_jax.errors import UserError, printable
from cait_jax.files import to_json

TIMING_KEYS = ("time", "train/images_per_second")
"""The keys of `metrics.jsonl` that may differ between two runs of the same config."""

_SHORT = {"learning_rate": "lr"}
_FORMATS = {"loss": ".4f", "accuracy": ".3f", "lr": ".1e", "grad_norm": ".2f"}
_TRAIN = "train/"
_EVAL = "eval/"
_REDRAW_SECONDS = 0.1


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` in their order, without a torn last one; `[]` for no file."""
    file = Path(path)
    return [row for _, row in metric_lines(file)] if file.exists() else []


def metric_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line and what it says. A power cut can leave more than one that is not whole."""
    for line in file.read_bytes().split(b"\n"):
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and "step" in row:
                yield line, row


@runtime_checkable
class Stream(Protocol):
    """What a report needs of a text stream."""

    def write(self, text: str, /) -> Any:
        """Takes `text`."""

    def flush(self) -> Any:
        """Passes on what was taken."""

    def isatty(self) -> bool:
        """Whether this is a terminal."""
        ...


class MetricWriter:
    """Writes the metrics of a run under `workdir` and shows how it goes on `stream`.

    Keys are `"train/loss"`, `"train/accuracy"`, `"train/learning_rate"`, `"train/grad_norm"`
    and `"eval/..."`. On a terminal `stream` carries a bar, else lines. Throughput (images/s) is
    measured since the last `log`. It leaves out the first step, which compiles, and pauses that end
    with a `write` without `train/` values, such as evaluation. Where `primary` is False every
    method does nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int = 0,
        images_per_step: int,
        tensorboard: bool = False,
        primary: bool = True,
        stream: Stream | None = None,
    ) -> None:
        """Opens the files, to append.

        Args:
          workdir: directory of the run, made if missing.
          total_steps: steps of the whole run.
          start_step: the step resumed from; 0 for a new run.
          images_per_step: size of the global batch.
          tensorboard: write event files to `workdir`/tensorboard too.
          primary: whether this process is the one that reports.
          stream: for the bar or the lines; None: standard error.

        Raises:
          UserError: tensorboardX is asked for and missing, or `workdir` cannot be written to.
        """
        self._primary = primary
        if not primary:
            return
        self._total = total_steps
        self._stream: Stream = sys.stderr if stream is None else stream
        self._clock = _Throughput(images_per_step)
        self._path = Path(workdir) / "metrics.jsonl"
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._board = _event_writer(self._path.parent, start_step) if tensorboard else None
            self._file = self._path.open("ab")
        except OSError as error:
            raise UserError(f"{self._path} cannot be written to: {error.strerror}.") from error
        self._bar = self._open_bar(start_step) if self._stream.isatty() else None
        self._drawn = -math.inf

    def __enter__(self) -> "MetricWriter":
        """Returns itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends one line to `metrics.jsonl`, and to TensorBoard.

        The line is a JSON object of `step`, `time` (seconds since 1970), `values` in full precision
        (null where not finite) and, beside `train/` values, `train/images_per_second`. It reaches
        the operating system in one call; `sync` brings it to the disk.

        Raises:
          UserError: the file cannot be written to.
        """
        if not self._primary:
            return
        now = time.time()
        numbers = {key: float(value) for key, value in values.items()}
        if any(key.startswith(_TRAIN) for key in numbers):
            rate = self._clock.images_per_second(step)
            if rate is not None:
                numbers.setdefault("train/images_per_second", rate)
        else:
            self._clock.pause_ends()
        row = {"step": step, "time": now, **numbers}
        line = to_json(row)
        try:
            self._file.write(line.encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self._path} cannot be written to: {error.strerror}.") from error
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step, walltime=now)

    def sync(self) -> None:
        """Returns when every line is on the disk. For before a checkpoint is saved.

        Raises:
          UserError: the disk refuses.
        """
        if not self._primary:
            return
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self._path} cannot be written to: {error.strerror}.") from error
        if self._board is not None:
            self._board.flush()

    def progress(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Counts a finished step and moves the bar, if there is one. For every step: cheap."""
        if not self._primary:
            return
        now = self._clock.tick(step)
        if self._bar is not None and now - self._drawn >= _REDRAW_SECONDS:
            self._draw(step, values)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Shows `values`, throughput and the time left, as a line or in the bar.

        Values without `train/` ones, such as those of evaluation, are always a line, without
        throughput.
        """
        if not self._primary:
            return
        if not any(key.startswith(_TRAIN) for key in values):
            self.message("  ".join([self._position(step), *_fields(values)]))
        elif self._bar is not None:
            self._draw(step, values)
            self._clock.restart(step)
        else:
            fields = [self._position(step), *_fields(values), *self._pace(step)]
            self.message("  ".join(fields))
            self._clock.restart(step)

    def message(self, text: str) -> None:
        """Says a sentence, above the bar if there is one; names in it are made `printable`."""
        if not self._primary:
            return
        text = printable(text, keep="\n")
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Closes the files and leaves the bar as it stands. May be called twice."""
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(OSError):  # of a line that `write` has already failed on
            self._file.close()
        if self._board is not None:
            self._board.close()

    def _open_bar(self, start_step: int) -> "tqdm[Any]":
        return tqdm(
            total=self._total,
            initial=start_step,
            file=self._stream,
            dynamic_ncols=True,
            bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
        )

    def _draw(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        assert self._bar is not None
        self._bar.n = max(self._bar.n, step)
        self._bar.set_postfix_str("  ".join([*_fields(values), *self._pace(step)]), refresh=False)
        self._bar.refresh()
        self._drawn = time.monotonic()

    def _position(self, step: int) -> str:
        return f"step {step:>{len(str(self._total))}}/{self._total}"

    def _pace(self, step: int) -> list[str]:
        rate = self._clock.images_per_second(step)
        if rate is None:
            return []
        left = (self._total - step) * self._clock.images_per_step / rate
        return [f"{rate:>6,.0f} images/s", f"ETA {_duration(left)}"]


class _Throughput:
    """Images per second since the last `restart`, by the times at which steps finished."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._start: tuple[int, float] | None = None
        self._last: tuple[int, float] | None = None
        self._rate: float | None = None

    def tick(self, step: int) -> float:
        """Notes that `step` has finished. Returns the time (seconds, monotonic)."""
        now = time.monotonic()
        self._last = step, now
        if self._start is None:
            self._start = self._last
        return now

    def pause_ends(self) -> None:
        """Leaves out the time since the last finished step."""
        if self._start is not None and self._last is not None:
            now = time.monotonic()
            self._start = self._start[0], self._start[1] + now - self._last[1]
            self._last = self._last[0], now

    def images_per_second(self, step: int) -> float | None:
        """As of `step`; None before the second step of the run has finished."""
        if self._last is None or self._last[0] < step:
            self.tick(step)
        assert self._start is not None
        assert self._last is not None
        steps, seconds = self._last[0] - self._start[0], self._last[1] - self._start[1]
        if steps > 0 and seconds > 0:
            self._rate = steps * self.images_per_step / seconds
        return self._rate

    def restart(self, step: int) -> None:
        """Measures from the last finished step on."""
        self.images_per_second(step)
        self._start = self._last


def _fields(values: Mapping[str, SupportsFloat]) -> list[str]:
    """`"loss 0.4312"` for each value: short names, the known ones first, no timing."""
    named = {}
    for key, value in values.items():
        if key not in TIMING_KEYS:
            name = key.removeprefix(_TRAIN)
            named[_SHORT.get(name, name)] = float(value)
    order = [
        *(name for name in _FORMATS if name in named),
        *(n for n in named if n not in _FORMATS),
    ]
    return [
        f"{name} {named[name]:{_FORMATS.get(name.rpartition('/')[2], '.4g')}}" for name in order
    ]


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}"


def _event_writer(workdir: Path, start_step: int) -> Any:
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        raise UserError(
            'TensorBoard files need tensorboardX: pip install "cait-jax[tensorboard]".'
        ) from error
    # Hides what a killed run wrote after its last checkpoint.
    return SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)
