"""A watchdog for runs of several processes: when one hangs, all end, and each names it.

Every process enters the same phases in the same order. Twice a second each publishes, in the key-value store of
JAX's coordination service, how many it has entered, which the last was and for how long. The process that has
entered the fewest is the one that the others wait for.
"""

import dataclasses
import itertools
import json
import socket
import sys
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cait_jax.errors import one_line
from cait_jax.processes import leave

Exchange = Callable[[str], Mapping[int, str]]

PHASES = {
    "start": "its start",
    "barrier": "the barrier before step {}",
    "data": "the data of step {}",
    "step": "step {}",
    "save": "the save of step {}",
    "evaluation": "the evaluation of step {}",
}
_GO_ON = "the same command goes on from the last checkpoint"
_INTERVAL_S = 0.5
_PROCESSES_AN_INTERVAL = 64  # more of them publish less often
_MEASURED = 100
_RUNS = itertools.count()  # of this process: each has its own keys


@dataclasses.dataclass(frozen=True)
class Report:
    """What a process publishes.

    Attributes:
      beat: differs from report to report.
      entered: phases entered so far; -1 once it has left them all.
      seconds: in the phase.
      limit: on `seconds`.
      verdict: why the run must end; else "".
    """

    beat: int
    entered: int
    phase: str
    step: int
    seconds: float
    limit: float
    host: str
    verdict: str = ""


class Watchdog(AbstractContextManager["Watchdog", None]):
    """Watches the processes of a run while it is entered as a context.

    A phase may last `factor` times the slowest of its kind of late, but at least `seconds`; the first of each kind
    compiles or connects, and may last `start_seconds`. So may a process be silent for `seconds`. After that every
    process ends, with status 1 and a sentence.
    """

    def __init__(
        self,
        limits: ConfigDict,
        *,
        index: int | None = None,
        count: int | None = None,
        exchange: Exchange | None = None,
        end: Callable[[str], None] | None = None,
    ) -> None:
        """Takes the limits of `config.watchdog`.

        Args:
          exchange: publishes this process's report and gives those of all; by default through JAX.
          end: ends the process with a sentence.
        """
        self._seconds, self._factor = limits.seconds, limits.factor
        self._start_seconds = limits.start_seconds
        self._index = jax.process_index() if index is None else index
        self._count = jax.process_count() if count is None else count
        self._exchange = exchange or _through_jax(self._index)
        self._end = end or _end
        self._interval = _INTERVAL_S * max(1.0, self._count / _PROCESSES_AN_INTERVAL)
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MEASURED))
        self._seen_phases: set[str] = set()
        self._lock = threading.Lock()
        # Of this process: phases entered, the last, its step, when it began, and its limit.
        self._now = (0, "start", 0, time.monotonic(), float(self._start_seconds))
        self._reports: dict[int, tuple[float, Report]] = {}
        self._began = self._asked = time.monotonic()
        self._answered = True
        self._verdict = ""
        self._closed = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"watchdog-{work.__name__}", daemon=True)
            for work in (self._publish, self._watch)
        ]

    def __enter__(self) -> "Watchdog":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: object) -> None:
        """Says to the others that this process has left: at the end, or by an error."""
        if kind is not None and not _follows(error):
            reason = one_line(f"{kind.__name__}: {error}".rstrip(": "))
            self._verdict = (
                f"{_name(self._index, socket.gethostname())} ended in {_place(*self._now[1:3])} by {reason}: see "
                f"what it printed; {_GO_ON}"
            )
        self._now = (-1, *self._now[1:])
        self._closed.set()
        for thread in self._threads:
            thread.join(self._interval)
        if kind is None:
            return
        if self._verdict and self._index == 0:  # whose service the others ask
            time.sleep(2 * self._interval)
        if not self._verdict and (sentence := self._heard()):
            self._end(sentence)

    def enter(self, phase: str, step: int) -> None:
        """Begins a phase: one of `PHASES`."""
        now = time.monotonic()
        with self._lock:
            entered, before, _, began, _ = self._now
            if before in self._seen_phases:
                self._durations[before].append(now - began)
            self._seen_phases.add(before)
            slowest = max(self._durations[phase], default=None)
            limit = self._start_seconds if slowest is None else self._factor * slowest
            self._now = entered + 1, phase, step, now, float(max(limit, self._seconds))

    def report(self) -> Report:
        """Of this process, now."""
        entered, phase, step, began, limit = self._now
        now = time.monotonic()
        return Report(
            beat=time.monotonic_ns(), entered=entered, phase=phase, step=step, seconds=now - began, limit=limit,
            host=socket.gethostname(), verdict=self._verdict,
        )  # fmt: skip

    def judge(self, now: float) -> str:
        """Why the run must end, at a time (seconds, monotonic); "" while it need not."""
        if sentence := self._heard():
            return sentence
        reports = dict(self._reports)
        own = self.report()
        if not self._answered and now - self._asked > 2 * self._interval:
            # The reports are old, of process 0's service.
            _, first = reports.get(0, (now, own))
            late = self._index and now - self._asked > self._seconds
            return _silent(0, first, now - self._asked) if late else ""
        standing: dict[int, Report] = {self._index: own} if own.entered >= 0 else {}
        for index in set(range(self._count)) - {self._index}:
            if index not in reports:
                standing[index] = dataclasses.replace(
                    own, entered=0, phase="start", seconds=now - self._began, limit=self._start_seconds, host=""
                )  # fmt: skip
                continue
            seen, report = reports[index]
            if report.entered < 0:
                continue
            if now - seen > self._seconds:
                return _silent(index, report, now - seen)
            standing[index] = dataclasses.replace(report, seconds=report.seconds + now - seen)
        if not standing:
            return ""
        fewest = min(report.entered for report in standing.values())
        last = {i: report for i, report in standing.items() if report.entered == fewest}
        if any(report.seconds <= report.limit for report in last.values()):
            return ""
        index, report = min(last.items())
        seen = reports[index][0] if index in reports else now
        if now - seen > 4 * self._interval:
            return _silent(index, report, now - seen)
        who = _name(index, report.host)
        if len(last) > 1:
            who = f"{len(last)} of {self._count} processes, {who} among them,"
        return (
            f"{who} spent {report.seconds:.0f} s in {_place(report.phase, report.step)}, where "
            f"{report.limit:.0f} s are allowed (--config.watchdog), and the others wait: see what hangs there; "
            f"{_GO_ON}"
        )

    def _heard(self) -> str:
        """The verdict of another process, if there is one."""
        return next((r.verdict for _, r in list(self._reports.values()) if r.verdict), "")

    def _publish(self) -> None:
        closing = False
        while not closing:
            closing = self._closed.is_set()
            if self._answered:
                self._asked, self._answered = time.monotonic(), False
            try:
                found = self._exchange(json.dumps(dataclasses.asdict(self.report())))
                reports = {index: Report(**json.loads(text)) for index, text in found.items()}
            except Exception:  # the service is gone: what is not answered counts as silence
                self._closed.wait(self._interval)
                continue
            self._answered = True
            now = time.monotonic()
            for index, report in reports.items():
                known = self._reports.get(index)
                if index != self._index and (known is None or known[1].beat != report.beat):
                    self._reports[index] = now, report
            if not closing:
                self._closed.wait(self._interval)

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - last > 5 * self._interval:
                # This process was stopped, and the others may have been.
                self._forgive(now - last)
            last = now
            sentence = self.judge(now)
            if sentence:
                found_here = not self._heard()
                self._verdict = sentence
                # The others are to read it, from the service that process 0 runs.
                if self._answered and (found_here or self._index == 0):
                    time.sleep(2 * self._interval)
                self._end(sentence)
                return

    def _forgive(self, seconds: float) -> None:
        with self._lock:
            entered, phase, step, began, limit = self._now
            self._now = entered, phase, step, began + seconds, limit
        self._asked += seconds
        self._reports = {i: (seen + seconds, report) for i, (seen, report) in self._reports.items()}


def _silent(index: int, report: Report, seconds: float) -> str:
    return (
        f"{_name(index, report.host)} has not answered for {seconds:.0f} s, last in "
        f"{_place(report.phase, report.step)}: it is stopped, or its machine is cut off; end it, then "
        f"{_GO_ON}"
    )


def _name(index: int, host: str) -> str:
    return f"process {index}{f' on {host}' if host else ''}"


def _place(phase: str, step: int) -> str:
    return PHASES[phase].format(step)


def _follows(error: object) -> bool:
    """Whether an error may be the consequence of another process's end."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error)


def _through_jax(index: int) -> Exchange:
    # No public interface leads to the key-value store; Orbax takes this way too.
    from jax._src import distributed

    client: Any = distributed.global_state.client
    folder = f"cait_jax/watchdog/{next(_RUNS)}/"

    def exchange(report: str) -> Mapping[int, str]:
        client.key_value_set(f"{folder}{index}", report, allow_overwrite=True)
        found = client.key_value_dir_get(folder)
        return {int(key.rpartition("/")[2]): value for key, value in found}

    return exchange


def _end(sentence: str) -> None:
    leave(1, f"{Path(sys.argv[0]).name}: {sentence}")
