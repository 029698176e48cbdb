"""The training loop: data, model, step, checkpoint and report put together."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cait_jax.data.augment import Augmentation
from cait_jax.data.pipeline import eval_batches, train_batches
from cait_jax.data.sources import Encoded, InMemory, load_split
from cait_jax.errors import UserError
from cait_jax.models.cait import CaiT
from cait_jax.models.zoo import create_model
from cait_jax.train.checkpoint import Checkpoints
from cait_jax.train.config import as_json, check_resumable
from cait_jax.train.evaluate import evaluate, make_eval_step
from cait_jax.train.interrupt import StopRequest
from cait_jax.train.optimizer import learning_rate_schedule, make_optimizer
from cait_jax.train.report import Report, rewind
from cait_jax.train.sharding import (
    check_batch_size,
    make_mesh,
    over_batch,
    put_batch,
    replicated,
)
from cait_jax.train.state import TrainState, create_state
from cait_jax.train.step import Recipe, TrainStep, make_train_step

Split = InMemory | Encoded


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


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything a run is made of, checked but not compiled. `set_up` makes it from a config.

    Attributes:
      config: the config.
      model: the model.
      train_split: the training examples.
      eval_split: the examples for evaluation.
      total_steps: steps of the whole run.
      steps_per_epoch: training examples over batch size, not rounded.
      optimizer: the Optax chain.
      train_step: the step, jitted, its state donated.
      eval_step: see `make_eval_step`, jitted.
      init: a function without arguments that makes the state before the first step, on the mesh.
      mesh: the devices.
    """

    config: ConfigDict
    model: CaiT
    train_split: Split
    eval_split: Split
    total_steps: int
    steps_per_epoch: float
    optimizer: optax.GradientTransformation
    train_step: TrainStep
    eval_step: Callable[..., Any]
    init: Callable[[], TrainState]
    mesh: Mesh

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.model.image_size

    def batches(self, start_step: int = 0) -> Iterator[dict[str, np.ndarray]]:
        """This process's training batches from `start_step` on, without end."""
        config = self.config
        return train_batches(
            self.train_split,
            seed=config.seed,
            batch_size=config.batch_size,
            image_size=self.image_size,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            crop_scale=tuple(config.augment.crop_area),
            crop_ratio=tuple(config.augment.crop_aspect),
        )

    def evaluate(self, params: Any) -> dict[str, float]:
        """Evaluates parameters on the evaluation split: `loss` in nats and `accuracy` from 0 to 1."""
        config = self.config
        batches = eval_batches(
            self.eval_split,
            batch_size=-(-config.eval.batch_size // self.mesh.size) * self.mesh.size,
            image_size=self.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            crop_ratio=config.eval.crop_ratio,
        )
        return evaluate(self.eval_step, params, batches, over_batch(self.mesh))


def set_up(config: ConfigDict, devices: list[jax.Device] | None = None) -> Setup:
    """Makes everything a run needs from its config, and refuses what cannot work.

    Args:
      config: as `configs/common.py` describes it.
      devices: devices to train on; all of them if not given.

    Returns:
      The parts of the run. Nothing is compiled yet.

    Raises:
      UserError: for a setting, a data set or a size that does not fit.
    """
    mesh = make_mesh(devices)
    check_batch_size(config.batch_size, mesh, config.optimizer.accumulate)
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)

    data = config.data
    train_split, eval_split = (
        load_split(data.name, split, image_size=size, data_dir=data.data_dir)
        for split in (data.train_split, data.eval_split)
    )
    if config.batch_size > len(train_split):
        raise UserError(
            f"batch_size {config.batch_size} is larger than the {len(train_split)} examples of "
            f"{data.name}'s split {data.train_split!r}: set --config.batch_size to at most that"
        )
    model = create_model(
        image_size=size,
        num_classes=train_split.num_classes,
        in_channels=train_split.channels,
        **{key: value for key, value in config.model.items() if value is not None},
    )

    steps_per_epoch = len(train_split) / config.batch_size
    total_steps = config.steps or max(1, round(config.epochs * steps_per_epoch))
    schedule = _schedule(config, total_steps, steps_per_epoch)
    optimizer = make_optimizer(
        schedule,
        b1=config.optimizer.b1,
        b2=config.optimizer.b2,
        eps=config.optimizer.eps,
        weight_decay=config.optimizer.weight_decay,
        clip_norm=config.optimizer.clip_norm,
    )
    recipe = _recipe(config)

    def init() -> TrainState:
        images = jnp.zeros((1, *size, model.in_channels))
        params = model.init(jax.random.key(config.seed), images)["params"]
        return create_state(params, optimizer, ema=recipe.ema_decay > 0)

    whole, rows = replicated(mesh), over_batch(mesh)
    return Setup(
        config=config,
        model=model,
        train_split=train_split,
        eval_split=eval_split,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        optimizer=optimizer,
        train_step=jax.jit(
            make_train_step(model, optimizer, schedule, recipe),
            in_shardings=(whole, rows),
            out_shardings=(whole, whole),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            make_eval_step(model, recipe.mean, recipe.std),
            in_shardings=(whole, rows, whole),
            out_shardings=whole,
        ),
        init=jax.jit(init, out_shardings=whole),
        mesh=mesh,
    )


def train(config: ConfigDict, workdir: str | Path) -> Run:
    """Trains a model, from the start or from where an earlier call in `workdir` came to.

    A run is a function of its config: however often it was stopped and resumed, it ends with the same bits on
    the same machine. `workdir` receives `metrics.jsonl` and `checkpoints/`.

    Args:
      config: as `configs/common.py` describes it.
      workdir: the run's directory, made if missing.

    Returns:
      The run. A run found finished in `workdir` is read back, and nothing is trained.

    Raises:
      UserError: for a setting, a data set or a checkpoint that does not fit, before anything is compiled.
      NonFiniteError: when the loss or the gradient is no longer finite; the last checkpoint is from before.
    """
    workdir = Path(workdir)
    setup = set_up(config)
    workdir.mkdir(parents=True, exist_ok=True)
    with Checkpoints(
        workdir / "checkpoints", keep=config.checkpoint.keep, best_metric="eval/accuracy"
    ) as checkpoints:
        if checkpoints.latest_step() is not None:
            check_resumable(checkpoints.meta()["config"], config, str(workdir))
        meta: dict[str, Any] = {}
        restored = checkpoints.restore(_abstract_state(setup))
        if restored is None:
            start, state = 0, setup.init()
        else:
            start, state, meta = restored
        if jax.process_index() == 0:
            rewind(workdir / "metrics.jsonl", start)
        with Report(
            workdir,
            total_steps=setup.total_steps,
            start_step=start,
            images_per_step=config.batch_size,
            tensorboard=config.report.tensorboard,
            primary=jax.process_index() == 0,
        ) as report:
            metrics = meta.get("metrics", {})
            if start >= setup.total_steps:
                report.message(
                    f"the run in {workdir} is finished ({start} steps, {_summary(metrics)}): to start "
                    "anew, give another --workdir or remove this one"
                )
                return Run(setup.model, state, metrics, finished=True)
            report.message(_greeting(setup, workdir, start))
            return _run(setup, state, start, metrics, checkpoints, report)


def _run(
    setup: Setup,
    state: TrainState,
    start: int,
    metrics: dict[str, float],
    checkpoints: Checkpoints,
    report: Report,
) -> Run:
    config, total = setup.config, setup.total_steps
    eval_every = max(1, round(config.eval.every_epochs * setup.steps_per_epoch))
    save_every = config.checkpoint.every_steps
    sharding = over_batch(setup.mesh)
    last_saved = start

    def finish(step: int, values: Any) -> None:
        """Reads a step's metrics; called once the next step is on its way."""
        values = {f"train/{name}": float(v) for name, v in jax.device_get(values).items()}
        if not all(math.isfinite(values[f"train/{n}"]) for n in ("loss", "grad_norm")):
            saved = f"the checkpoint of step {last_saved}" if last_saved else "no checkpoint yet"
            raise NonFiniteError(
                f"step {step}: loss {values['train/loss']}, gradient norm "
                f"{values['train/grad_norm']}; there is {saved} to go on from: lower "
                "--config.optimizer.learning_rate, or set --config.optimizer.clip_norm=1"
            )
        report.progress(step, values)
        if step % config.report.every_steps == 0 or step == total:
            report.write(step, values)
            report.log(step, values)

    batches = setup.batches(start)
    pending: tuple[int, Any] | None = None
    try:
        with StopRequest() as stop:
            for step in range(start + 1, total + 1):
                state, step_metrics = setup.train_step(state, put_batch(next(batches), sharding))
                if pending is not None:
                    finish(*pending)
                pending = (step, step_metrics)
                evaluating = step % eval_every == 0 or step == total
                saving = evaluating or step % save_every == 0
                if not saving and not stop.requested:
                    continue

                finish(*pending)
                pending = None
                if evaluating:
                    metrics = _evaluate(setup, state)
                    report.write(step, metrics)
                    report.log(step, metrics)
                report.sync()
                checkpoints.save(
                    step,
                    state,
                    {"config": as_json(config), "metrics": metrics},
                    metrics if evaluating else None,
                )
                last_saved = step
                if stop.requested and step < total:
                    report.message(
                        f"stopped after step {step} of {total}: the same command goes on from there"
                    )
                    return Run(setup.model, state, metrics, finished=False)
    finally:
        batches.close()  # type: ignore[attr-defined]
    return Run(setup.model, state, metrics, finished=True)


def _evaluate(setup: Setup, state: TrainState) -> dict[str, float]:
    metrics = {f"eval/{name}": value for name, value in setup.evaluate(state.params).items()}
    if state.ema:
        metrics |= {f"eval/ema_{name}": v for name, v in setup.evaluate(state.ema).items()}
    return metrics


def _schedule(config: ConfigDict, total_steps: int, steps_per_epoch: float) -> optax.Schedule:
    optimizer = config.optimizer
    reference = optimizer.reference_batch
    return learning_rate_schedule(
        peak=optimizer.learning_rate * (config.batch_size / reference if reference else 1.0),
        total_steps=total_steps,
        warmup_steps=round(optimizer.warmup_epochs * steps_per_epoch),
        warmup_from=optimizer.warmup_learning_rate,
        final=optimizer.final_learning_rate,
    )


def _recipe(config: ConfigDict) -> Recipe:
    augment = config.augment
    return Recipe(
        seed=config.seed,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augmentation=Augmentation(
            flip=augment.flip,
            pad_crop=augment.pad_crop,
            rotate=augment.rotate,
            zoom=augment.zoom,
            shear=augment.shear,
            translate=augment.translate,
        ),
        label_smoothing=config.loss.label_smoothing,
        accumulate=config.optimizer.accumulate,
        ema_decay=config.optimizer.ema_decay,
    )


def _abstract_state(setup: Setup) -> Any:
    """Shapes, dtypes and shardings of the state."""
    sharding = replicated(setup.mesh)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        jax.eval_shape(setup.init),
    )


def _summary(metrics: dict[str, float]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _greeting(setup: Setup, workdir: Path, start: int) -> str:
    data, config = setup.config.data, setup.config
    parameters = sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(setup.init).params))
    return (
        f"{config.model.name} ({parameters:,} parameters) on {len(setup.train_split):,} images of "
        f"{data.name}, {setup.mesh.size} {jax.devices()[0].platform} device(s), steps {start + 1} to "
        f"{setup.total_steps:,} of {config.batch_size} images; {workdir}"
    )
