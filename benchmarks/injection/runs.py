"""The small training that is disturbed, its undisturbed twin, and the comparison of two runs."""

import functools
import hashlib
import logging
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cait_jax.checkpoint import manifest
from cait_jax.errors import UserError, one_line
from cait_jax.train.metrics import TIMING_KEYS, read_metrics
from injection.inside import Marks, digests
from injection.launch import ROOT, Child, Launcher, wait

STEPS, EVERY = 16, 3
RUN_S = 300.0  # in which a run must have ended, on a machine that has other work
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "batch_size": 64,
    "model.width": 32,
    "model.depth": 1,
    "model.class_depth": 1,
    "model.num_heads": 2,
    "model.dropout": 0.1,
    "optimizer.ema_decay": 0.9,
    "checkpoint.every_steps": EVERY,
    "eval.every_epochs": 5 * 64 / 1437,  # every 5 steps
    "report.every_steps": 1,
}


def options(workdir: Path, **settings: Any) -> list[str]:
    """The command line of the small training; a key's dots are written as `__`."""
    given = SETTINGS | {key.replace("__", "."): value for key, value in settings.items()}
    return [
        f"--config={ROOT / 'configs' / 'digits.py'}",
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in given.items()),
    ]


def untimed(workdir: Path) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl` without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in TIMING_KEYS}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]


def committed(workdir: Path) -> list[int]:
    """Steps that have a valid manifest, ascending."""
    found = []
    for path in (workdir / "checkpoints").glob("[0-9]*"):
        if path.name.isdecimal():
            try:
                manifest.read(path)
            except manifest.DamagedError:
                continue
            found.append(int(path.name))
    return sorted(found)


def strangers(workdir: Path) -> list[str]:
    """What lies in the directory of a finished run and does not belong there."""
    found = [path.name for path in workdir.iterdir()]
    extra = sorted(set(found) - {"metrics.jsonl", "checkpoints"})
    for path in (workdir / "checkpoints").iterdir():
        if not path.name.isdecimal() and path.name not in ("run.json", "broken"):
            extra.append(f"checkpoints/{path.name}")
    return [f"{name} was left in the workdir" for name in extra]


class Bench:
    """What all trials share: where they write, the launcher, the reference runs, and who compares states."""

    def __init__(self, out: Path, *, launching: bool = True) -> None:
        self.out = out.absolute()
        self.out.mkdir(parents=True, exist_ok=True)
        self.launcher = Launcher(self.out)
        self._checker = self.launcher.call_in_fork(_answer) if launching else None

    def check(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Calls a function of this module in the process that may use JAX."""
        if self._checker is None:
            return function(*arguments)
        self._checker.send((function, arguments))
        result = self._checker.recv()
        if isinstance(result, BaseException):
            raise result
        return result

    def reference(self, *, processes: int = 1, devices: int = 1, **settings: Any) -> "Reference":
        """The run that nobody disturbs, with a checkpoint of every step; made once for each version."""
        name = _digest(repr((processes, devices, sorted(settings.items()), _version())))
        reference = Reference(self.out / "references" / name, settings)
        if not (reference.folder / "done").exists():
            self._make(reference, processes, devices)
        return reference

    def _make(self, reference: "Reference", processes: int, devices: int) -> None:
        programs: int | None = None
        # Again, if it has compiled: a trial reads what was compiled, and its moments follow the times here.
        while programs != (programs := len(list(self.launcher.cache.iterdir()))):
            rm(reference.folder)
            reference.folder.mkdir(parents=True)
            began = time.monotonic()
            environment = {"JAX_ENABLE_X64": "1"} if reference.wide else {}
            children = self.launcher.start(
                options(
                    reference.workdir,
                    **reference.settings,
                    checkpoint__keep=1000,
                    checkpoint__every_steps=1,
                ),
                reference.folder / "log",
                processes=processes,
                devices=devices,
                hooks={index: reference.hook(index) for index in range(processes)},
                environment=environment,
                fill_cache=True,
            )
            ended = wait(children, RUN_S)
            if not ended or any(child.status for child in children):
                for child in children:
                    child.send(9)
                said = "\n".join(child.said() for child in children)
                raise SystemExit(f"faults.py: the reference run failed:\n{said}")
        (reference.folder / "done").write_text(f"{began} {time.monotonic()}")


class Reference:
    """An undisturbed run on disk."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self.settings = folder, settings
        self.workdir = folder / "run"

    @property
    def wide(self) -> bool:
        """Whether it is computed in float64."""
        return _wide(self.settings)

    def hook(self, index: int) -> Callable[[], None]:
        """What process `index` calls before it begins."""

        def install() -> None:
            from injection.inside import record_resume

            if index == 0:
                Marks(self.folder / "marks").install()
            record_resume(self.folder / "resume")

        return install

    @property
    def start_s(self) -> float:
        """Seconds to the first step."""
        began = float((self.folder / "done").read_text().split()[0])
        return next(at for name, _, at in self.marks() if name == "step") - began

    @property
    def seconds(self) -> float:
        """Seconds of the whole run."""
        began, ended = map(float, (self.folder / "done").read_text().split())
        return ended - began

    @property
    def pause_s(self) -> float:
        """The longest time from one mark to the second after it: a step with its evaluation and its save."""
        times = [at for name, number, at in self.marks() if number > 1]
        return max(b - a for a, b in zip(times, times[2:], strict=False))

    def marks(self) -> list[tuple[str, int, float]]:
        """See `Marks.read`."""
        return Marks(self.folder / "marks").read()


def finish(bench: Bench, workdir: Path, log: Path, reference: Reference, **start: Any) -> list[str]:
    """Starts the same command again, undisturbed; what differs from the reference at its end."""
    children: list[Child] = bench.launcher.start(
        options(workdir, **reference.settings), log, **start
    )
    ended = wait(children, RUN_S)
    for child in children:
        child.send(9)
    if not ended:
        return [f"the restart did not end in {RUN_S:.0f} s"]
    codes = [child.status for child in children]
    if any(codes):
        lines = [child.said().strip().splitlines()[-1:] for child in children]
        return [f"the restart ended with {codes}: {lines}"]
    return bench.check(compare_finished, workdir, reference)


# Called in the process that uses JAX.


def compare_finished(workdir: Path, reference: Reference) -> list[str]:
    """How a finished run differs from the reference, in words; empty if in nothing."""
    problems = strangers(workdir)
    found, expected = untimed(workdir), untimed(reference.workdir)
    if found != expected:
        at = next((i for i, rows in enumerate(zip(found, expected)) if rows[0] != rows[1]), -1)  # noqa: B905
        problems.append(
            f"metrics differ: {len(found)} rows instead of {len(expected)}, the first at {at}"
        )
    step, differing = compare_newest(workdir, reference)
    if step != STEPS:
        problems.append(f"the last sound step is {step}")
    return problems + differing


def compare_newest(workdir: Path, reference: Reference) -> tuple[int | None, list[str]]:
    """The newest sound step, and how its state differs from the reference's of that step."""
    try:
        state = restored(workdir, reference.settings)
    except UserError as error:
        return None, [one_line(str(error))]
    if state is None:
        return None, []
    step, found = state
    expected = _expected(reference, step)
    differing = [path for path in expected if found.get(path) != expected[path]]
    if differing or found.keys() != expected.keys():
        return step, [f"of step {step} {len(differing)} arrays differ, the first {differing[:1]}"]
    return step, []


def restored(
    workdir: Path, settings: dict[str, Any], step: int | None = None
) -> tuple[int, dict[str, str]] | None:
    """The step that a run would start from, or the one asked for, and the digests of its arrays."""
    import jax

    from cait_jax.checkpoint.store import Checkpoints

    fixed = {key: value for key, value in settings.items() if not key.startswith("mesh__")}
    with jax.enable_x64(_wide(settings)), Checkpoints(workdir / "checkpoints") as checkpoints:
        found = checkpoints.restore(template(*sorted(fixed.items())), step)
        return None if found is None else (found[0], digests(found[1]))


_of_references: dict[tuple[Path, int], dict[str, str]] = {}


def _expected(reference: Reference, step: int) -> dict[str, str]:
    key = reference.workdir, step
    if key not in _of_references:
        found = restored(reference.workdir, reference.settings, step)
        assert found is not None
        _of_references[key] = found[1]
    return _of_references[key]


@functools.cache
def template(*settings: tuple[str, Any]) -> Any:
    """Shapes and dtypes of the small training's state, on one device."""
    import jax

    from cait_jax.train.config import load_config, parse_command_line
    from cait_jax.train.setup import build

    command = parse_command_line(options(Path("unused"), **dict(settings)))
    return build(load_config(command.file, command.overrides), jax.devices()[:1]).abstract_state


def _wide(settings: dict[str, Any]) -> bool:
    return settings.get("model__param_dtype") == "float64"


def _answer(pipe: Connection) -> None:
    """Answers `Bench.check` until the other end is closed."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    logging.disable(logging.WARNING)
    while True:
        function, arguments = pipe.recv()
        try:
            pipe.send(function(*arguments))
        except Exception as error:
            pipe.send(RuntimeError(f"{function.__name__}: {type(error).__name__}: {error}"))


@functools.cache
def _version() -> str:
    """Of the package's sources, by their contents."""
    sources = sorted([*(ROOT / "cait_jax").rglob("*.py"), ROOT / "train.py", Path(__file__)])
    return _digest("".join(path.read_text() for path in sources))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def rm(folder: Path) -> None:
    """Removes a folder with all that is in it, if it is there."""
    import shutil

    shutil.rmtree(folder, ignore_errors=True)
