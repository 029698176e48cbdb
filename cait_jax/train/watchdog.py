"""A watchdog for runs of several processes: when one hangs, all end, and each names it.

Every process enters the same phases in the same order. Twice a second each publishes, through the connections of
`peers`, how many it has entered, which the last was and for how long. The process that has entered the fewest is
the one that the others wait for.
"""

import dataclasses
import threading
import time
from collections import defaultdict, deque
from contextlib import AbstractContextManager

from ml_collections import ConfigDict

from cait_jax.errors import one_line
from cait_jax.peers import Peers
from cait_jax.processes import failed_exchange

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
_NAMED = 4  # processes in a sentence


@dataclasses.dataclass(frozen=True)
class Report:
    """What a process publishes.

    Attributes:
      beat: differs from report to report.
      entered: phases entered so far; -1 once it has left them all.
      seconds: in the phase.
      limit: on `seconds`.
    """

    beat: int
    entered: int
    phase: str
    step: int
    seconds: float
    limit: float

    @property
    def place(self) -> str:
        """In words."""
        return PHASES[self.phase].format(self.step)


class Watchdog(AbstractContextManager["Watchdog", None]):
    """Watches the processes of a run while it is entered as a context.

    A phase may last `factor` times the slowest of its kind of late, but at least `seconds`; the first of each kind
    compiles or connects, and may last `start_seconds`. So may a process be silent for `seconds`. After that every
    process ends, with status 1 and a sentence.
    """

    def __init__(self, limits: ConfigDict, peers: Peers, *, index: int, count: int) -> None:
        """Takes the limits of `config.watchdog`."""
        self._seconds, self._factor = limits.seconds, limits.factor
        self._start_seconds = limits.start_seconds
        self._peers, self._index, self._count = peers, index, count
        self._interval = _INTERVAL_S * max(1.0, count / _PROCESSES_AN_INTERVAL)
        self._durations: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_MEASURED))
        self._seen_phases: set[str] = set()
        self._lock = threading.Lock()
        # Of this process: phases entered, the last, its step, when it began, and its limit.
        self._now = (0, "start", 0, time.monotonic(), float(self._start_seconds))
        self._reports: dict[int, tuple[float, Report]] = {}
        self._began = time.monotonic()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="watchdog", daemon=True)

    def __enter__(self) -> "Watchdog":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: object
    ) -> None:
        """Tells the others that this process has left: at the end, or by an error of its own."""
        place = self.report().place
        with self._lock:
            self._now = (-1, *self._now[1:])
        self._closed.set()
        self._thread.join(self._interval)
        self._exchange()
        if kind is None:
            self._peers.leave()
        elif not failed_exchange(error):
            reason = one_line(f"{kind.__name__}: {error}".rstrip(": "))
            self._peers.end_others(
                f"{self._peers.name(self._index)} ended in {place} by {reason}: see what it printed; {_GO_ON}"
            )

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
        return Report(time.monotonic_ns(), entered, phase, step, now - began, limit)

    def judge(self, now: float) -> str:
        """Why the run must end, at a time (seconds, monotonic); "" while it need not."""
        reports = dict(self._reports)
        if 0 in reports and now - reports[0][0] > 4 * self._interval:
            # The reports come from process 0, and all are old.
            seen, first = reports[0]
            return self._silent(0, first, now - seen) if now - seen > self._seconds else ""
        own = self.report()
        standing: dict[int, Report] = {self._index: own} if own.entered >= 0 else {}
        for index in set(range(self._count)) - {self._index}:
            if index not in reports:
                standing[index] = dataclasses.replace(
                    own, entered=0, phase="start", seconds=now - self._began, limit=self._start_seconds
                )  # fmt: skip
                continue
            seen, report = reports[index]
            if report.entered < 0:
                continue
            if now - seen > self._seconds:
                return self._silent(index, report, now - seen)
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
            return self._silent(index, report, now - seen)
        who = " and ".join(map(self._peers.name, sorted(last)))
        if len(last) > _NAMED:
            who = f"{len(last)} of {self._count} processes, {self._peers.name(index)} among them,"
        return (
            f"{who} spent {report.seconds:.0f} s in {report.place}, where {report.limit:.0f} s are allowed "
            f"(--config.watchdog), and the others wait: see what hangs there; {_GO_ON}"
        )

    def _silent(self, index: int, report: Report, seconds: float) -> str:
        return (
            f"{self._peers.name(index)} has not answered for {seconds:.0f} s, last in {report.place}: it is "
            f"stopped, or its machine is cut off; end it, then {_GO_ON}"
        )

    def _exchange(self) -> None:
        report = self.report()
        found = self._peers.exchange(report.place, dataclasses.asdict(report))
        now = time.monotonic()
        for index, values in found.items():
            known = self._reports.get(index)
            if index != self._index and (known is None or known[1].beat != values["beat"]):
                self._reports[index] = now, Report(**values)

    def _work(self) -> None:
        last = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - last > 5 * self._interval:
                # This process was stopped, and the others may have been.
                self._forgive(now - last)
            last = now
            self._exchange()
            if sentence := self.judge(now):
                self._peers.end_all(sentence)
                return

    def _forgive(self, seconds: float) -> None:
        with self._lock:
            entered, phase, step, began, limit = self._now
            self._now = entered, phase, step, began + seconds, limit
        self._reports = {i: (seen + seconds, report) for i, (seen, report) in self._reports.items()}
