"""The training loop: step, evaluation, checkpoint and report, from a run's start or where it came to."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.data.folder import left_out_of
from cait_jax.data.loader import PrefetchIterator
from cait_jax.errors import Way, advise
from cait_jax.files import run_folder
from cait_jax.models.cait import CaiT
from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train.config import as_json
from cait_jax.train.distributed import check_shared
from cait_jax.train.interrupt import StopSignal
from cait_jax.train.metric_writer import MetricWriter
from cait_jax.train.resume import check_resumed, describe_data, rewind
from cait_jax.train.setup import Setup, abstract_state, set_up
from cait_jax.train.state import TrainState

# Some seconds of long steps: what it takes to start processes that decode images, and to decode a batch.
_LOAD_AHEAD_STEPS = 30


class NonFiniteError(RuntimeError):
    """The loss or the gradient became infinite or not a number."""


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished or stopped run.

    Attributes:
      model: the model; `model.apply({"params": state.params}, images)`.
      state: the state after the last step.
      metrics: the last evaluation, such as `eval/accuracy` (0 to 1); empty if there was none.
      finished: whether all steps were taken.
    """

    model: CaiT
    state: TrainState
    metrics: dict[str, float]
    finished: bool


def train(config: ConfigDict, workdir: str | Path) -> Run:
    """Trains a model, from the start or from where an earlier call in `workdir` came to.

    A run is a function of its config: however often it was stopped and resumed, it ends with the same bits on
    the same machine. `workdir` receives `metrics.jsonl` and `checkpoints/`.

    Args:
      config: as `cait_jax/train/defaults.py` describes it.
      workdir: the run's directory, made if missing.

    Returns:
      The run. A run found finished in `workdir` is read back, and nothing is trained.

    Raises:
      UserError: for a setting, a data set or a checkpoint that does not fit, before anything is compiled.
      NonFiniteError: when the loss or the gradient is no longer finite; the last checkpoint is from before.
    """
    workdir = run_folder(workdir)
    setup = set_up(config)
    workdir.mkdir(parents=True, exist_ok=True)
    if jax.process_count() > 1:
        check_shared(workdir)
    with Checkpoints(
        workdir / "checkpoints", keep=config.checkpoint.keep, best_metric="eval/accuracy"
    ) as checkpoints:
        data = describe_data(setup.train_split, setup.eval_split)
        if checkpoints.latest_step() is not None:
            check_resumed(checkpoints.meta(), config, data, str(workdir))
        meta: dict[str, Any] = {}
        restored = checkpoints.restore(abstract_state(setup))
        if restored is None:
            start, state = 0, setup.start()
        else:
            start, state, meta = restored
        # Of the restored state's own evaluation; empty if none was due, or it was not finished.
        recorded = checkpoints.metrics(start) if start else {}
        evaluated = bool(recorded) or start == 0 or _to_evaluation(setup, start) > 0
        written = workdir / "metrics.jsonl"
        if jax.process_index() == 0 and written.exists():
            rewind(written, start, evaluated=evaluated)
        with MetricWriter(
            workdir,
            total_steps=setup.total_steps,
            start_step=start,
            images_per_step=config.batch_size,
            tensorboard=config.report.tensorboard,
            primary=jax.process_index() == 0,
        ) as report:
            metrics = recorded or meta.get("metrics", {})
            if start >= setup.total_steps and evaluated:
                report.message(
                    f"the run in {workdir} is finished ({start} steps, {_summary(metrics)}): to start "
                    "anew, give another --workdir or remove this one"
                )
                return Run(setup.model, state, metrics, finished=True)
            if start < setup.total_steps:
                report.message(_greeting(setup, state, workdir, start))
            left_out = map(left_out_of, (setup.train_split, setup.eval_split))
            for message in dict.fromkeys(filter(None, left_out)):  # once of a folder for both
                report.message(message)
            return _run(setup, state, start, metrics, data, checkpoints, report, evaluated)


def _to_evaluation(setup: Setup, step: int) -> int:
    """Steps from a step to the next whose state is evaluated; 0 if its own is."""
    every = max(1, round(setup.config.eval.every_epochs * setup.steps_per_epoch))
    return min(-step % every, setup.total_steps - step)


def _run(
    setup: Setup,
    state: TrainState,
    start: int,
    metrics: dict[str, float],
    data: Mapping[str, Any],
    checkpoints: Checkpoints,
    report: MetricWriter,
    evaluated: bool,
) -> Run:
    config, total = setup.config, setup.total_steps
    save_every = config.checkpoint.every_steps
    sharding = batch_sharding(setup.mesh)
    last_saved = start
    pending: tuple[int, Any] | None = None

    def finish() -> None:
        """Reads the pending step's metrics, if there is one; in the loop, when the next step is dispatched."""
        nonlocal pending
        if pending is None:
            return
        (step, values), pending = pending, None
        values = {f"train/{name}": float(v) for name, v in jax.device_get(values).items()}
        if not all(math.isfinite(values[f"train/{n}"]) for n in ("loss", "grad_norm")):
            saved = f"the checkpoint of step {last_saved}" if last_saved else "no checkpoint yet"
            raise NonFiniteError(
                f"step {step}: loss {values['train/loss']}, gradient norm "
                f"{values['train/grad_norm']}; there is {saved} to go on from: "
                + advise(
                    Way("lower {}", "config.optimizer.learning_rate"),
                    Way("set {}", "config.optimizer.grad_clip_norm", 1),
                    otherwise=advise(
                        Way("let less learn, by {}", "what", "head"), "start from other weights"
                    ),
                )
            )
        report.progress(step, values)
        if step % config.report.every_steps == 0 or step == total:
            report.write(step, values)
            report.log(step, values)

    def evaluate(step: int, batches: PrefetchIterator) -> None:
        """Evaluates the saved state of a step, and adds the result to its lines and its checkpoint."""
        nonlocal metrics
        metrics = _evaluate(setup, state, batches)
        report.write(step, metrics)
        report.log(step, metrics)
        report.sync()
        checkpoints.record(step, metrics)

    if not evaluated:
        report.message(f"step {start} is saved and its evaluation was not finished: evaluating it")
        evaluate(start, setup.eval_batches())
    batches = setup.batches(start)
    eval_batches: PrefetchIterator | None = None
    try:
        with StopSignal() as stop:
            for step in range(start + 1, total + 1):
                state, step_metrics = setup.train_step(state, put_batch(next(batches), sharding))
                finish()
                pending = (step, step_metrics)
                to_evaluation = _to_evaluation(setup, step)
                if eval_batches is None and to_evaluation <= _LOAD_AHEAD_STEPS:
                    eval_batches = setup.eval_batches()
                evaluating = to_evaluation == 0
                stopping = stop.reached(step)
                if not (evaluating or stopping or step % save_every == 0):
                    continue

                finish()
                report.sync()
                checkpoints.save(
                    step,
                    state,
                    {
                        "config": as_json(config),
                        "metrics": metrics,
                        "class_names": list(setup.train_split.class_names),
                        "channels": setup.model.in_channels,
                        "data": data,
                    },
                )
                last_saved = step
                if stopping and step < total:
                    report.message(
                        f"stopped after step {step} of {total}: the same command goes on from there"
                    )
                    return Run(setup.model, state, metrics, finished=False)
                if evaluating and eval_batches is not None:
                    evaluate(step, eval_batches)
                    eval_batches = None
    finally:
        batches.close()
        if eval_batches is not None:
            eval_batches.close()
    return Run(setup.model, state, metrics, finished=True)


def _evaluate(setup: Setup, state: TrainState, batches: PrefetchIterator) -> dict[str, float]:
    weights = {"": state.params} | ({"ema_": state.ema} if state.ema else {})
    return {
        f"eval/{prefix}{name}": value
        for prefix, values in setup.evaluate(weights, batches).items()
        for name, value in values.items()
    }


def _summary(metrics: dict[str, float]) -> str:
    numbers = ((name, math.nan if value is None else value) for name, value in metrics.items())
    return "  ".join(f"{name} {value:.4f}" for name, value in numbers)


def _greeting(setup: Setup, state: TrainState, workdir: Path, start: int) -> str:
    data, config = setup.config.data, setup.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return (
        f"{config.model.name} ({parameters:,} parameters) on {len(setup.train_split):,} images of "
        f"{data.name}, {setup.mesh.size} {jax.devices()[0].platform} device(s), steps {start + 1} to "
        f"{setup.total_steps:,} of {config.batch_size} images; {workdir}"
    )
