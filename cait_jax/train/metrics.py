"""Metrics of a run: `metrics.jsonl`, written, read and cut to a checkpoint; a bar or log lines; trackers."""

import contextlib
import hashlib
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from io import TextIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, SupportsFloat, TextIO

from tqdm import tqdm

from cait_jax.errors import StorageError, printable
from cait_jax.files import atomic_replace, to_json
from cait_jax.reading import check_regular, parse_json

if TYPE_CHECKING:
    from cait_jax.train.trackers import Picture, Tracker

# The keys of `metrics.jsonl` that may differ between two runs of the same config.
TIMING_KEYS = ("time", "train/images_per_second")
MAX_LINE = 2**20
"""Bytes of a line of `metrics.jsonl`."""
_SHORT_NAMES = {"learning_rate": "lr"}
_FORMATS = {"loss": ".4f", "accuracy": ".3f", "lr": ".1e", "grad_norm": ".2f"}
_TRAIN = "train/"
_REDRAW_SECONDS = 0.1


class MetricWriter:
    """Writes metrics under `workdir` and shows progress on `stream`: a bar on a terminal, else lines.

    Keys are such as `train/loss` and `eval/accuracy`. Throughput (images/s) is measured since the last `log`,
    without the first step, which compiles, and without pauses that end with a `write` of no `train/` values, such
    as evaluation. Where `primary` is False every method does nothing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        *,
        total_steps: int,
        start_step: int = 0,
        images_per_step: int,
        trackers: Sequence["Tracker"] = (),
        primary: bool = True,
        stream: TextIO | TextIOBase | None = None,
    ) -> None:
        """Opens `metrics.jsonl` to append; `stream` is standard error by default."""
        self._primary = primary
        if not primary:
            return
        self._total = total_steps
        self._stream = sys.stderr if stream is None else stream
        self._throughput = _Throughput(images_per_step)
        self._path = Path(workdir) / "metrics.jsonl"
        with self._explaining("give another place"):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("ab", buffering=0)
        self._unwritten = b""
        self._written = LinesDigest()
        rows = read_metrics(self._path)
        for row in rows:
            self._written.add(row)
        self._bar: tqdm[Any] | None = None
        if self._stream.isatty():
            self._bar = tqdm(
                total=total_steps,
                initial=start_step,
                file=self._stream,
                dynamic_ncols=True,
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}",
            )
        self._drawn = -math.inf
        self._trackers = trackers
        for tracker in trackers:
            tracker.start(self.message, rows)

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def write(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Appends a line to `metrics.jsonl`, and gives it to the trackers.

        It is a JSON object of `step`, `time` (seconds since 1970), `values` in full precision (null where not
        finite) and, beside `train/` values, `train/images_per_second`.
        """
        if not self._primary:
            return
        now = time.time()
        numbers = {key: float(value) for key, value in values.items()}
        if any(key.startswith(_TRAIN) for key in numbers):
            rate = self._throughput.images_per_second(step)
            if rate is not None:
                numbers.setdefault("train/images_per_second", rate)
        else:
            self._throughput.end_pause()
        row = {"step": step, "time": now, **numbers}
        self._written.add(row)
        self._unwritten += to_json(row).encode() + b"\n"
        with contextlib.suppress(OSError):  # `sync` tries again, and raises
            self._flush()
        for tracker in self._trackers:
            tracker.write(step, now, numbers)

    def picture(self, step: int, name: str, picture: "Picture") -> None:
        """Gives a picture of the state after a step to the trackers."""
        if self._primary:
            for tracker in self._trackers:
                tracker.picture(step, name, picture)

    def sync(self) -> None:
        """Returns when every line is on the disk; to be called before a checkpoint is saved.

        Raises:
          StorageError: some cannot be written; they are kept for the next call.
        """
        if not self._primary:
            return
        with self._explaining():
            self._flush()
            os.fsync(self._file.fileno())
        for tracker in self._trackers:
            tracker.flush()

    def written(self) -> dict[str, Any]:
        """Number and SHA-256 of the lines of `metrics.jsonl`, for `rewind`."""
        return self._written.value() if self._primary else {}

    def progress(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Counts a finished step and moves the bar, if there is one. For every step: cheap."""
        if not self._primary:
            return
        now = self._throughput.tick(step)
        if self._bar is not None and now - self._drawn >= _REDRAW_SECONDS:
            self._draw(self._bar, step, values)

    def log(self, step: int, values: Mapping[str, SupportsFloat]) -> None:
        """Shows `values`: of training with throughput and the time left, others always as a line."""
        if not self._primary:
            return
        fields = [f"step {step:>{len(str(self._total))}}/{self._total}", *_fields(values)]
        if not any(key.startswith(_TRAIN) for key in values):
            self.message("  ".join(fields))
            return
        if self._bar is not None:
            self._draw(self._bar, step, values)
        else:
            self.message("  ".join([*fields, *self._pace(step)]))
        self._throughput.restart(step)

    def message(self, text: str) -> None:
        """Shows a sentence, above the bar if there is one; names in it are made `printable`."""
        if not self._primary:
            return
        text = printable(text, keep="\n")
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        else:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Closes the files and leaves the bar as it is. May be called twice."""
        if not self._primary:
            return
        if self._bar is not None:
            self._bar.close()
        with contextlib.suppress(OSError):  # of lines on which `sync` has failed
            self._flush()
        self._file.close()
        for tracker in self._trackers:
            tracker.close()

    @contextlib.contextmanager
    def _explaining(self, remedy: str = "make room or mend the disk") -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"{self._path} cannot be written to ({error.strerror}): {remedy}"
            ) from error

    def _flush(self) -> None:
        while self._unwritten:
            self._unwritten = self._unwritten[self._file.write(self._unwritten) :]

    def _draw(self, bar: "tqdm[Any]", step: int, values: Mapping[str, SupportsFloat]) -> None:
        bar.n = max(bar.n, step)
        bar.set_postfix_str("  ".join([*_fields(values), *self._pace(step)]), refresh=False)
        bar.refresh()
        self._drawn = time.monotonic()

    def _pace(self, step: int) -> list[str]:
        rate = self._throughput.images_per_second(step)
        if rate is None:
            return []
        left = (self._total - step) * self._throughput.images_per_step / rate
        return [f"{rate:>6,.0f} images/s", f"ETA {_duration(left)}"]


class _Throughput:
    """Images per second since the last `restart`, by the times at which steps finished."""

    def __init__(self, images_per_step: int) -> None:
        self.images_per_step = images_per_step
        self._start: tuple[int, float] | None = None  # a step, and the time at which it finished
        self._last: tuple[int, float] | None = None
        self._rate: float | None = None

    def tick(self, step: int) -> float:
        """Notes that `step` has finished. Returns the time (seconds, monotonic)."""
        now = time.monotonic()
        self._last = step, now
        if self._start is None:
            self._start = self._last
        return now

    def end_pause(self) -> None:
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
            named[_SHORT_NAMES.get(name, name)] = float(value)
    order = sorted(named, key=lambda name: [*_FORMATS, name].index(name))
    return [
        f"{name} {named[name]:{_FORMATS.get(name.rpartition('/')[2], '.4g')}}" for name in order
    ]


def _duration(seconds: float) -> str:
    minutes, second = divmod(round(max(seconds, 0.0)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{second:02}"


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl` in their order, without a torn last one; `[]` for no file."""
    file = Path(path)
    return [row for _, row in metric_lines(file)] if file.exists() else []


def metric_lines(file: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Each whole line and its row, whose `step` is an int. A power cut can leave lines that are not whole.

    Lines of more than `MAX_LINE` bytes are none. Raises `OSError` for what is no regular file.
    """
    check_regular(file)
    with file.open("rb") as stream:
        while line := stream.readline(MAX_LINE):
            if len(line) == MAX_LINE and not line.endswith(b"\n"):
                while (rest := stream.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                    pass
                continue
            line = line.removesuffix(b"\n")
            with contextlib.suppress(ValueError):
                row = parse_json(line.decode())
                if isinstance(row, dict) and type(row.get("step")) is int:
                    yield line, row


def rewind(
    path: Path, step: int, *, evaluated: bool = True, expected: Mapping[str, Any] | None = None
) -> str:
    """Cuts every line after `step` from a `metrics.jsonl`, and lines that are not whole.

    Args:
      evaluated: whether the evaluation of `step` itself stays.
      expected: `MetricWriter.written` when `step` was saved.

    Returns:
      A sentence if lines of before the save are lost or changed, else an empty string.
    """

    def stays(row: dict[str, Any]) -> bool:
        if row["step"] == step and not evaluated:
            return not any(key.startswith("eval/") for key in row)
        return bool(row["step"] <= step)

    digest, size = LinesDigest(), 0
    for line, row in metric_lines(path) if path.exists() else ():
        if stays(row):
            size += len(line) + 1
            if expected and digest.lines < expected["lines"]:
                digest.add(row)
    if path.exists() and size != path.stat().st_size:
        with atomic_replace(path) as temporary, temporary.open("wb") as stream:
            stream.writelines(line + b"\n" for line, row in metric_lines(path) if stays(row))
    if not expected or digest.value() == expected:
        return ""
    return (
        f"{path} has lost lines or they were changed since step {step} was saved, when it had "
        f"{expected['lines']}; there are {digest.lines}, and training goes on after them"
    )


class LinesDigest:
    """SHA-256 of the rows of a `metrics.jsonl` without their times: the same however often a run was resumed."""

    def __init__(self) -> None:
        self.lines, self._sha256 = 0, hashlib.sha256()

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes the next row."""
        timeless = {key: value for key, value in row.items() if key not in TIMING_KEYS}
        self._sha256.update(to_json(timeless).encode() + b"\n")
        self.lines += 1

    def value(self) -> dict[str, Any]:
        """Number of rows and their digest, as JSON."""
        return {"lines": self.lines, "sha256": self._sha256.hexdigest()}
