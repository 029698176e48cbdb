"""The training loop: step, checkpoint, evaluation and metrics, from the start of a run or where it was stopped."""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.data.loader import PrefetchIterator
from cait_jax.data.sampler import recorded_order
from cait_jax.data.split import identity
from cait_jax.errors import StorageError
from cait_jax.files import DirectoryLock, run_folder
from cait_jax.processes import check_shared, peers
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train import objectives
from cait_jax.train.config import as_json
from cait_jax.train.metrics import MetricWriter, rewind
from cait_jax.train.nonfinite import NonFiniteSteps
from cait_jax.train.resume import check_resumed
from cait_jax.train.setup import MakeObjective, Trainer, build
from cait_jax.train.signals import save_signal, stop_signal
from cait_jax.train.step import Record, Recording, TrainState, all_finite

# Steps before an evaluation at which its batches start to load: starting the processes that decode takes seconds.
_PREFETCH_STEPS = 30


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or stopped run.

    Attributes:
      model: the network; `model.apply({"params": state.params}, images)`.
      state: after the last step.
      metrics: of the last evaluation, such as `eval/accuracy` (0 to 1); empty if there was none.
      finished: whether all steps were taken.
    """

    model: Any
    state: TrainState
    metrics: dict[str, float]
    finished: bool


def train(
    config: ConfigDict,
    workdir: str | Path,
    make_objective: MakeObjective = objectives.from_config,
) -> Run:
    """Trains a model, from the start or from the last checkpoint in `workdir`.

    A run is a function of its config: however often it was stopped and resumed, it ends with the same bits on
    the same machine. A run that is finished is restored, and nothing is trained.

    Args:
      config: see `cait_jax.train.keys`.
      workdir: made if missing; receives `metrics.jsonl` and `checkpoints/`.
      make_objective: what is learnt; by default what `config.objective` names.

    Raises:
      UserError: for a setting, a data set or a checkpoint that does not fit, before anything is compiled.
      NonFiniteError: loss, gradient or parameters were not finite in more steps than `nonfinite` allows, or the
        last evaluation is not; what is saved is finite.
    """
    workdir = run_folder(workdir)
    trainer = build(config, make_objective=make_objective)
    workdir.mkdir(parents=True, exist_ok=True)
    primary = jax.process_index() == 0
    with (
        _watchdog(config) as enter,
        DirectoryLock(workdir) if primary else contextlib.nullcontext() as lock,
        Checkpoints(
            workdir / "checkpoints",
            keep=config.checkpoint.keep,
            best_metric=getattr(trainer.objective, "best_metric", "eval/accuracy"),
        ) as checkpoints,
    ):
        if jax.process_count() > 1:
            enter("barrier", 0)
            check_shared(workdir)
            enter("start", 0)
        splits = {"train": trainer.train_split, "eval": trainer.eval_split}
        data = {name: identity(split) for name, split in splits.items()}
        data["train"] |= recorded_order(len(trainer.train_split), balanced=config.data.balanced)
        if checkpoints.latest_step() is not None:
            check_resumed(checkpoints.meta(), config, data, str(workdir))
        restored = checkpoints.restore(trainer.abstract_state)
        start, state, meta = restored or (0, trainer.init_state(workdir), {})
        # Of the restored state's own evaluation; empty if none was due, or it was not finished.
        recorded = checkpoints.metrics(start) if start else {}
        evaluated = bool(recorded) or start == 0 or _steps_to_evaluation(trainer, start) > 0
        metrics = recorded or meta.get("metrics", {})
        written = workdir / "metrics.jsonl"
        lost = ""
        if primary:
            lost = rewind(written, start, evaluated=evaluated, expected=meta.get("metrics_file"))
        with MetricWriter(
            workdir,
            total_steps=trainer.total_steps,
            start_step=start,
            images_per_step=config.batch_size,
            trackers=_trackers(config, workdir, start) if primary else (),
            primary=primary,
        ) as writer:
            non_finite = NonFiniteSteps(config, str(workdir), **meta.get("nonfinite", {}))
            for message in filter(None, (lock.taken_over if lock else "", lost)):
                writer.message(message)
            if start >= trainer.total_steps and evaluated:
                non_finite.check_metrics(start, metrics)
                summary = "  ".join(
                    f"{name} {math.nan if value is None else value:.4f}"
                    for name, value in metrics.items()
                )
                writer.message(
                    f"the run in {workdir} is finished ({start} steps, {summary}): to start "
                    "anew, give another --workdir or remove this one"
                )
                return Run(trainer.model, state, metrics, finished=True)
            if start < trainer.total_steps:
                writer.message(_greeting(trainer, state, workdir, start))
            left_out = (trainer.train_split.left_out, trainer.eval_split.left_out)
            for message in dict.fromkeys(filter(None, left_out)):  # once of a folder for both
                writer.message(message)
            run = _run(
                trainer, state, start, metrics, data, checkpoints, writer, evaluated,
                _recorders(trainer, workdir), _predictions(trainer, writer, workdir), non_finite, lock, enter,
            )  # fmt: skip
        if run.finished:
            non_finite.check_metrics(trainer.total_steps, run.metrics)
        return run


def _run(
    trainer: Trainer,
    state: TrainState,
    start: int,
    metrics: dict[str, float],
    data: Mapping[str, Any],
    checkpoints: Checkpoints,
    writer: MetricWriter,
    evaluated: bool,
    recorders: Sequence[tuple[int, Record]],
    predictions: Callable[[int, Mapping[str, Any]], None] | None,
    non_finite: NonFiniteSteps,
    lock: DirectoryLock | None,
    enter: Callable[[str, int], None],
) -> Run:
    config, total = trainer.config, trainer.total_steps
    sharding = batch_sharding(trainer.mesh)
    is_finite = jax.jit(all_finite)
    patience = config.checkpoint.retry_seconds
    pending: tuple[int, Any] | None = None

    def write_pending() -> bool:
        """Reads the metrics of the step before, while the devices compute the next; whether to roll back."""
        nonlocal pending
        if pending is None:
            return False
        (step, values), pending = pending, None
        values = jax.device_get(values)
        finite = bool(values.pop("finite"))
        values = {f"train/{name}": float(value) for name, value in values.items()}
        if not finite:
            writer.message(non_finite.skip(step, values))
        else:
            non_finite.skipped = 0
        writer.progress(step, values)
        if step % config.report.every_steps == 0 or step == total or not finite:
            writer.write(step, values)
        if step % config.report.every_steps == 0 or step == total:
            writer.log(step, values)
        return bool(non_finite.skipped > config.nonfinite.skips)

    def rolled_back(step: int) -> TrainState:
        """The state of the last checkpoint before the steps that were skipped, as the one after `step`."""
        point = checkpoints.rollback_step()
        non_finite.roll_back(step, point or 0)
        found = checkpoints.restore(trainer.abstract_state, point) if point else None
        state: TrainState = found[1] if found else trainer.init_state()
        writer.message(
            f"step {step}: rolled back to the state of step {point or 0}; training goes on with the batch of step "
            f"{step + 1}"
        )
        number = jax.device_put(np.int32(step), state.step.sharding)
        return dataclasses.replace(state, step=number)

    def save(step: int, *, due: bool, must: bool) -> bool:
        """Saves the state of a step; whether it could be saved."""

        def work() -> None:
            writer.sync()
            checkpoints.save(
                step,
                state,
                {
                    "config": as_json(config),
                    "metrics": metrics,
                    "class_names": list(trainer.train_split.class_names),
                    "channels": trainer.model.in_channels,
                    "data": data,
                    "nonfinite": non_finite.counts,
                    "metrics_file": writer.written(),
                },
                rollback_point=due and not non_finite.skipped,
            )
            if must:
                checkpoints.wait()

        enter("save", step)
        _store(checkpoints.wait, writer)  # of the save before
        return _store(work, writer, retry_seconds=patience if must else None)

    def evaluate(step: int, batches: PrefetchIterator, *, saved: bool = True) -> None:
        """Evaluates the state of a step, and adds the metrics to its lines and its checkpoint."""
        nonlocal metrics
        batches.before_each = functools.partial(enter, "evaluation", step)
        metrics = _evaluate(trainer, state, batches)
        writer.write(step, metrics)
        writer.log(step, metrics)
        if predictions is not None:
            _store(functools.partial(predictions, step, _evaluated(trainer, state)), writer)
        enter("save", step)
        last = patience if step == total else None
        if _store(writer.sync, writer, retry_seconds=last) and saved:
            checkpoints.record(step, metrics)

    if not evaluated:
        writer.message(f"step {start} is saved and its evaluation was not finished: evaluating it")
        evaluate(start, trainer.eval_batches())
    batches = trainer.train_batches(start)
    eval_batches: PrefetchIterator | None = None
    try:
        with stop_signal() as reached, save_signal() as asked:
            for step in range(start + 1, total + 1):
                enter("data", step)
                batch = put_batch(next(batches), sharding)
                enter("step", step)
                state, step_metrics = trainer.train_step(state, batch)
                if write_pending():
                    state, step_metrics = trainer.train_step(rolled_back(step - 1), batch)
                pending = (step, step_metrics)
                if lock is not None:
                    lock.check()
                for every, record in recorders:
                    if step % every == 0:
                        _store(functools.partial(record, step, state.params, batch), writer)
                remaining = _steps_to_evaluation(trainer, step)
                if eval_batches is None and remaining <= _PREFETCH_STEPS:
                    eval_batches = trainer.eval_batches()
                stopping = reached(step)
                due = remaining == 0 or step % config.checkpoint.every_steps == 0
                if not (due or stopping or asked()):
                    continue

                roll_back = write_pending()
                sound = bool(is_finite(state))
                if roll_back or (due and not sound):
                    state = rolled_back(step)
                elif not sound:
                    writer.message(f"step {step} is not saved: its state is not finite")
                    if stopping:
                        return Run(trainer.model, state, metrics, finished=False)
                    continue
                saved = save(step, due=due, must=stopping or step == total)
                if eval_batches is not None and remaining == 0 and (not stopping or step == total):
                    evaluate(step, eval_batches, saved=saved)
                    eval_batches = None
                    stopping = reached(step)
                if stopping and step < total:
                    writer.message(
                        f"stopped after step {step} of {total}: the same command goes on from there"
                    )
                    return Run(trainer.model, state, metrics, finished=False)
    finally:
        batches.close()
        if eval_batches is not None:
            eval_batches.close()
    return Run(trainer.model, state, metrics, finished=True)


def _trackers(config: ConfigDict, workdir: Path, start: int) -> Sequence[Any]:
    report = config.report
    if not (report.tensorboard or report.wandb or report.mlflow or report.trackio):
        return ()
    from cait_jax.train import trackers

    return trackers.from_config(config, workdir, start)


def _predictions(
    trainer: Trainer, writer: MetricWriter, workdir: Path
) -> Callable[[int, Mapping[str, Any]], None] | None:
    """What draws predictions of named parameters at an evaluation."""
    if not trainer.config.report.predictions:
        return None
    from cait_jax.train.predictions import prediction_recorder

    return prediction_recorder(trainer, writer, workdir)


def _recorders(trainer: Trainer, workdir: Path) -> list[tuple[int, Record]]:
    """What writes records in the course of the run, each with the steps between two of them."""
    recorders: list[tuple[int, Record]] = []
    if every := trainer.config.report.inspect_every:
        from cait_jax.train.branch_records import branch_recorder

        recorders.append((every, branch_recorder(trainer, workdir)))
    if isinstance(trainer.objective, Recording) and (
        own := trainer.objective.recorder(trainer, workdir)
    ):
        recorders.append(own)
    return recorders


def _store(
    work: Callable[[], None], writer: MetricWriter, *, retry_seconds: float | None = None
) -> bool:
    """Whether something could be stored; what must be is tried for `retry_seconds`, and raises at last.

    So does what one of several processes cannot store at once: the others wait for it in the next save.
    """
    pause, deadline = 1.0, time.monotonic() + (retry_seconds or 0.0)
    while True:
        try:
            work()
            return True
        except StorageError as error:
            optional = retry_seconds is None
            if jax.process_count() > 1 or not (optional or time.monotonic() + pause < deadline):
                again = "then run the same command again, which goes on from the last checkpoint"
                raise StorageError(f"{error}, {again}") from error
            then = "training goes on without it" if optional else f"trying again in {pause:.0f} s"
            writer.message(f"{error}; {then}")
            if optional:
                return False
        time.sleep(pause)
        pause = min(2 * pause, 30.0)


@contextlib.contextmanager
def _watchdog(config: ConfigDict) -> Iterator[Callable[[str, int], None]]:
    """Yields what is to be told of each phase and its step."""
    others = peers() if jax.process_count() > 1 else None
    if others is None:
        yield lambda phase, step: None
        return
    from cait_jax.train.watchdog import Watchdog

    with Watchdog(
        config.watchdog, others, index=jax.process_index(), count=jax.process_count()
    ) as watchdog:
        yield watchdog.enter


def _steps_to_evaluation(trainer: Trainer, step: int) -> int:
    """Steps from a step to the next whose state is evaluated; 0 if its own is."""
    steps_per_epoch = len(trainer.train_split) / trainer.config.batch_size
    every = max(1, round(trainer.config.eval.every_epochs * steps_per_epoch))
    remaining: int = min(-step % every, trainer.total_steps - step)
    return remaining


def _evaluated(trainer: Trainer, state: TrainState) -> Mapping[str, Any]:
    """The parameters that are evaluated, by the prefix of their metrics."""
    params = {"": state.params} | ({"ema_": state.ema} if state.ema else {})
    if evaluated := getattr(trainer.objective, "evaluated", None):
        params = evaluated(params, state.carried)
    return params


def _evaluate(trainer: Trainer, state: TrainState, batches: PrefetchIterator) -> dict[str, float]:
    """The metrics of what is evaluated; of parameters that are not finite all are NaN."""
    named = _evaluated(trainer, state)
    return {
        f"eval/{prefix}{name}": value if all(map(math.isfinite, values.values())) else math.nan
        for prefix, values in trainer.evaluate(named, batches).items()
        for name, value in values.items()
    }


def _greeting(trainer: Trainer, state: TrainState, workdir: Path, start: int) -> str:
    config = trainer.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model.name} ({parameters:,} parameters) on {len(trainer.train_split):,} images of "
        f"{config.data.name}, {trainer.mesh.size} {jax.devices()[0].platform} device(s), steps {start + 1} to "
        f"{trainer.total_steps:,} of {config.batch_size} images; {workdir}"
    )
