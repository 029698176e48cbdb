"""Trials without a process of their own: damaged checkpoints, and steps that are not finite."""

import contextlib
import dataclasses
import io
import logging
import math
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.errors import UserError
from cait_jax.train import NonFiniteError, loop, setup, train
from cait_jax.train.config import load_config, parse_command_line
from cait_jax.train.objectives import supervised
from injection.runs import SETTINGS, Bench, options, restored, rm, untimed
from injection.trials import Outcome

# Damage


def damage(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """A file of the newest checkpoint, or of the two newest, is not what was written."""
    run, other = damaged_runs(bench)
    shutil.copytree(run, folder / "checkpoints")
    steps = sorted(int(p.name) for p in (folder / "checkpoints").glob("[0-9]*"))
    bad = steps[-draw.choice([1, 1, 1, 2]) :]
    done = {step: spoil(draw, folder / "checkpoints", step, other) for step in bad}
    sound = [step for step in steps if step not in bad]
    with heard() as messages:
        try:
            found = restored(folder, {})
            step, state = found if found is not None else (None, None)
        except UserError as error:
            step, state = str(error), None
    problems = []
    if step != sound[-1]:
        problems.append(f"{step} is used instead of step {sound[-1]}")
    elif state != expected_state(run, sound[-1]):
        problems.append(f"the state of step {step} differs")
    for _, now, named in done.values():
        if not any(f"step {now} under" in text and named in text for text in messages):
            problems.append(f"the log does not say of step {now} that {named}")
    return Outcome(done, {"restored": step}, problems)


_states: dict[tuple[Path, int], dict[str, str]] = {}


def expected_state(checkpoints: Path, step: int) -> dict[str, str]:
    """The digests of a sound step, read once."""
    if (checkpoints, step) not in _states:
        found = restored(checkpoints.parent, {}, step)
        assert found is not None
        _states[checkpoints, step] = found[1]
    return _states[checkpoints, step]


def damaged_runs(bench: Bench) -> tuple[Path, Path]:
    """The checkpoints of two runs of different seeds, with the same three steps; made once."""
    made = []
    for seed in (0, 1):
        workdir = bench.out / "damage_runs" / str(seed)
        if not (workdir / "done").exists():
            rm(workdir)
            command = parse_command_line(options(workdir, seed=seed, checkpoint__keep=3, steps=3,
                                                 checkpoint__every_steps=1))  # fmt: skip
            train(load_config(command.file, command.overrides), workdir)
            (workdir / "done").touch()
        made.append(workdir / "checkpoints")
    return made[0], made[1]


def spoil(draw: random.Random, directory: Path, step: int, other: Path) -> tuple[str, int, str]:
    """Damages a step; the kind, its number afterwards, and what the log is to name."""
    path = directory / str(step)
    kinds = ["bit", "bit", "truncated", "zeroed", "deleted", "swapped", "of another run"]
    kinds += ["another run's step", "renamed", "extra file"]
    while True:
        kind = draw.choice(kinds)
        file = draw.choice(sorted(p for p in path.rglob("*") if p.is_file()))
        name = file.relative_to(path).as_posix()
        before = content = file.read_bytes()
        if kind == "renamed":
            number = draw.choice([n for n in range(1, 20) if not (directory / str(n)).exists()])
            path.rename(directory / str(number))
            return kind, number, f"it is of step {step}"
        if kind == "another run's step":
            rm(path)
            shutil.copytree(other / str(step), path)
            return kind, step, "another run"
        if kind == "extra file":
            folders = [path, *(p for p in path.rglob("*") if p.is_dir())]
            extra = draw.choice(folders) / "extra"
            extra.write_bytes(draw.randbytes(draw.randrange(100)))
            return kind, step, extra.relative_to(path).as_posix()
        if kind == "deleted":
            file.unlink()
            return kind, step, name
        if kind == "bit" and before:
            at = draw.randrange(len(before))
            content = before[:at] + bytes([before[at] ^ 1 << draw.randrange(8)]) + before[at + 1 :]
        elif kind == "truncated" and before:
            content = before[: draw.randrange(len(before))]
        elif kind == "zeroed" and before:
            first, last = sorted(draw.sample(range(len(before) + 1), 2))
            content = before[:first] + bytes(last - first) + before[last:]
        elif kind == "swapped":
            twin = draw.choice(sorted(p for p in path.rglob("*") if p.is_file()))
            content = twin.read_bytes()
            if content != before:
                twin.write_bytes(before)
                file.write_bytes(content)
                # The first of the two by the manifest's order is named.
                return kind, step, ""
        elif kind == "of another run" and (other / str(step) / name).exists():
            content = (other / str(step) / name).read_bytes()
        if content != before:
            file.write_bytes(content)
            return kind, step, name


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What the package logs at warning level meanwhile."""
    messages: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: messages.append(record.getMessage())
    logger = logging.getLogger("cait_jax")
    logger.addHandler(handler)
    propagates, logger.propagate = logger.propagate, False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagates


# Steps that are not finite

MOST_STEPS = 20


@jax.custom_vjp
def _scale_gradient(loss: jax.Array, factor: jax.Array) -> jax.Array:
    """The loss as it is, and its gradient times a factor."""
    return loss


_scale_gradient.defvjp(
    lambda loss, factor: (loss, factor),
    lambda factor, gradient: (gradient * factor, jnp.zeros_like(factor)),
)


@struct.dataclass
class Poisoned:
    """An objective whose loss, gradient or images are not finite at some steps, counted from 1.

    Attributes:
      inner: the objective.
      steps: int32 (`MOST_STEPS`,), padded with 0.
      value: float32 scalar, NaN or infinite.
      kind: `"batch"`, `"loss"` or `"gradient"`; others leave all as it is.
    """

    inner: Any
    steps: jax.Array
    value: jax.Array
    kind: str = struct.field(pytree_node=False, default="")

    @property
    def model(self) -> Any:
        """The network."""
        return self.inner.model

    @property
    def rngs(self) -> Any:
        """Names of the keys."""
        return self.inner.rngs

    def init(self, key: Any, images: Any, params: Any = None) -> Any:
        """See `Objective`."""
        return self.inner.init(key, images, params)

    def prepare(self, batch: Any, keys: Any) -> Any:
        """See `Objective`."""
        return self.inner.prepare(batch, keys)

    def loss(self, params: Any, carried: Any, batch: Any, keys: Any, step: Any) -> Any:
        """See `Objective`."""
        hit = (self.steps == step + 1).any()
        if self.kind == "batch":
            batch = {
                **batch,
                "image": batch["image"].at[0].multiply(jnp.where(hit, self.value, 1.0)),
            }
        loss, aux = self.inner.loss(params, carried, batch, keys, step)
        if self.kind == "loss":
            loss = jnp.where(hit, self.value, loss)
        if self.kind == "gradient":
            loss = _scale_gradient(loss, jnp.where(hit, self.value, 1.0))
        return loss, aux

    def update(self, carried: Any, params: Any, aux: Any, step: Any) -> Any:
        """See `Objective`."""
        return self.inner.update(carried, params, aux, step)

    def evaluator(self, mesh: Any) -> Any:
        """See `Objective`."""
        return self.inner.evaluator(mesh)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is not finite, and when: steps from 1, or numbers of evaluations for `metric`."""

    kind: str
    at: tuple[int, ...]
    value: float
    skips: int
    rollbacks: int


def nonfinite(bench: Bench, draw: random.Random, folder: Path) -> Outcome:
    """Batch, loss, gradient, parameters or metrics that are not finite, on one and on eight devices."""
    kind = draw.choice(["batch", "gradient", "loss", "parameter", "metric"])
    last = SETTINGS["steps"]
    ways = ["one", "some", "row", "ten"]
    way = draw.choice(ways[:1] if kind in ("parameter", "metric") else ways)
    first = draw.randrange(1, last + 1)
    at = {
        "one": [first],
        "some": sorted(draw.sample(range(1, last + 1), 3)),
        "row": list(range(first, min(first + draw.randrange(2, 5), last + 1))),
        "ten": list(range(first % 6 + 1, first % 6 + 11)),
    }[way]
    if kind == "metric":
        at = [draw.randrange(1, 5)]
    value = draw.choice([math.nan, math.inf, -math.inf])
    plan = Plan(kind, tuple(at), value, draw.randrange(0, 4), draw.randrange(0, 3))
    seen = {devices: poisoned_run(plan, folder / f"on_{devices}", devices) for devices in (1, 8)}
    problems = [problem for run in seen.values() for problem in run.pop("problems")]
    if seen[1] != seen[8]:
        problems.append(f"1 and 8 devices differ: {seen[1]} and {seen[8]}")
    if kind in ("batch", "gradient", "loss"):
        skipped, rolled, ends = expected_course(plan, last)
        found = seen[1]
        if found["skipped"] != skipped:
            problems.append(f"steps {found['skipped']} were skipped instead of {skipped}")
        if len(found["rolled_back"]) != rolled or found["ends"] != ends:
            problems.append(f"{rolled} rollbacks and the end {ends} were expected")
    injected = {**dataclasses.asdict(plan), "value": str(value)}
    return Outcome(injected, seen[1], problems)


def expected_course(plan: Plan, last: int) -> tuple[list[int], int, str]:
    """Steps that are skipped, rollbacks, and the end: a count by hand of what `nonfinite` promises."""
    skipped, in_row, rollbacks = [], 0, 0
    for step in range(1, last + 1):
        in_row = in_row + 1 if step in plan.at else 0
        if step in plan.at:
            skipped.append(step)
        if in_row > plan.skips:
            if rollbacks == plan.rollbacks:
                return skipped, rollbacks, "NonFiniteError"
            rollbacks, in_row = rollbacks + 1, 0
    return skipped, rollbacks, "finished"


def poisoned_run(plan: Plan, workdir: Path, devices: int) -> dict[str, Any]:
    """What a run skips, where it is rolled back and how it ends; problems with what it leaves on disk."""
    command = parse_command_line(
        options(workdir, nonfinite__skips=plan.skips, nonfinite__rollbacks=plan.rollbacks)
    )
    config = load_config(command.file, command.overrides)
    steps = jnp.asarray([*plan.at, *[0] * (MOST_STEPS - len(plan.at))], jnp.int32)

    def make(config: Any, split: Any) -> Any:
        inner = supervised.from_config(config, split)
        return Poisoned(inner, steps, jnp.float32(plan.value), plan.kind)

    with said() as lines, changed_build(plan, devices):
        try:
            ends = "finished" if train(config, workdir, make).finished else "stopped"
        except NonFiniteError:
            ends = "NonFiniteError"
    rows = untimed(workdir)
    skipped = [row["step"] for row in rows if "train/loss" in row and not _finite_row(row)]
    rolled = [line.split(":")[0] for line in lines if "rolled back to the state of step" in line]
    problems, best = [], None
    if (workdir / "checkpoints").is_dir():
        with Checkpoints(workdir / "checkpoints", best_metric="eval/accuracy") as checkpoints:
            for path in (workdir / "checkpoints").glob("[0-9]*"):
                for part in ("params", "opt_state", "ema"):
                    found = checkpoints.restore_part(part, step=int(path.name))
                    if found and not all(np.isfinite(x).all() for x in jax.tree.leaves(found[1])):
                        problems.append(f"{part} of step {path.name} is saved and not finite")
            best = checkpoints.best_step()
        bad = {r["step"] for r in rows if "eval/loss" in r and r["eval/loss"] is None}
        if best in bad:
            problems.append(f"step {best} is the best, and its evaluation is not finite")
    return {
        "skipped": skipped,
        "rolled_back": rolled,
        "ends": ends,
        "best": best,
        "problems": problems,
    }


def _finite_row(row: dict[str, Any]) -> bool:
    return row["train/loss"] is not None and row["train/grad_norm"] is not None


@contextlib.contextmanager
def changed_build(plan: Plan, devices: int) -> Iterator[None]:
    """Has `train` use some devices, and spoil parameters before a step or an evaluation's metrics."""
    build = setup.build

    def changed(config: Any, **options: Any) -> Any:
        trainer = build(config, jax.devices()[:devices], **options)
        if plan.kind == "parameter":
            trainer = dataclasses.replace(trainer, step=_spoil_parameters(trainer.step, plan))
        if plan.kind == "metric":
            trainer = dataclasses.replace(trainer, evaluate=_spoil_metrics(trainer.evaluate, plan))
        return trainer

    with mock.patch.object(loop, "build", changed):
        yield


def _spoil_parameters(step: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    spoilt: set[int] = set()

    def spoiling(state: Any, batch: Any, objective: Any) -> Any:
        number = int(state.step) + 1
        if number in plan.at and number not in spoilt:
            spoilt.add(number)
            spoil = jax.jit(lambda params: jax.tree.map(lambda leaf: leaf * plan.value, params))
            state = dataclasses.replace(state, params=spoil(state.params))
        return step(state, batch, objective)

    return spoiling


def _spoil_metrics(evaluate: Callable[..., Any], plan: Plan) -> Callable[..., Any]:
    calls = 0

    def spoiling(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        found = evaluate(*args, **kwargs)
        if calls in plan.at:
            found = {
                name: {**values, "loss": plan.value, "accuracy": 1.0}
                for name, values in found.items()
            }
        return found

    return spoiling


@contextlib.contextmanager
def said() -> Iterator[list[str]]:
    """The lines that a run writes to standard error meanwhile."""
    lines: list[str] = []
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream):
        yield lines
    lines += stream.getvalue().splitlines()
