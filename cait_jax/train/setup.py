"""A run's parts, built from its config: mesh, data, objective, optimiser, jitted functions."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cait_jax.augment import mixup
from cait_jax.data.decode import crop_from_config
from cait_jax.data.loader import Batches, PrefetchIterator, eval_batches, train_batches
from cait_jax.data.sampler import warn_of_shared_draws
from cait_jax.data.sources import load_split
from cait_jax.data.split import Split
from cait_jax.errors import UserError, setting
from cait_jax.models.zoo import check_attention_memory
from cait_jax.sharding import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    check_memory,
    constrain_batch,
    make_mesh,
    mesh_sizes,
    padded_batch_size,
    param_shardings,
    replicated,
)
from cait_jax.train import objectives, optimizer
from cait_jax.train.config import check_values
from cait_jax.train.keys import INT32
from cait_jax.train.optimizer import Optimizer
from cait_jax.train.step import (
    Batch,
    Evaluate,
    Objective,
    TrainState,
    create_state,
    make_train_step,
)

# From a config and the training split to what is learnt.
MakeObjective = Callable[[ConfigDict, Split], Objective]


@dataclasses.dataclass(frozen=True)
class Trainer:
    """The parts of a run, checked and not yet compiled. `build` makes it from a config.

    Attributes:
      config: of the run.
      mesh: the devices.
      train_split: training examples.
      eval_split: evaluation examples.
      objective: what is learnt; its arrays are on the mesh.
      optimizer: with schedule and number of steps.
      abstract_state: shapes, dtypes and shardings of the state.
      step: (state, batch, objective) to (state, metrics), jitted; the state is donated.
      evaluate: the objective's evaluator.
      recorded_logits: of a teacher, for each training example; None: none are recorded.
    """

    config: ConfigDict
    mesh: Mesh
    train_split: Split
    eval_split: Split
    objective: Objective
    optimizer: Optimizer
    abstract_state: TrainState
    step: Any  # a jitted function, which has no type
    evaluate: Evaluate
    recorded_logits: np.ndarray | None = None

    @property
    def model(self) -> Any:
        """The objective's network."""
        return self.objective.model

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        return self.optimizer.total_steps

    def init_state(self, workdir: Path | None = None) -> TrainState:
        """The state before the first step: from the weights that the config names, or from the seed.

        Features for `init.fit_head` are kept in `workdir`.
        """
        params: Any = None
        if any(self.config.init.values()):
            from cait_jax.weights.pretrained import params_from_config

            params = params_from_config(self.config, self.model)
        if self.config.init.fit_head:
            from cait_jax.train.head import params_with_fitted_head

            params = params_with_fitted_head(
                self.config, self.model, params, self.train_split, workdir
            )
        init = functools.partial(_init, self.config, self.objective, self.optimizer)
        state: TrainState = jax.jit(init, out_shardings=_shardings(self.abstract_state))(params)
        return state

    def train_step(self, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        """The next state and metrics; see `make_train_step`."""
        stepped: tuple[TrainState, dict[str, Any]] = self.step(state, batch, self.objective)
        return stepped

    def train_batches(self, start_step: int = 0) -> Batches:
        """This process's training batches from `start_step` on, without end."""
        config = self.config
        labels = None
        if config.data.balanced:
            from cait_jax.evaluation.labels import read_labels

            labels = read_labels(self.train_split)
        logits = self.recorded_logits
        return train_batches(
            self.train_split,
            seed=config.seed,
            batch_size=config.batch_size,
            image_size=self.model.image_size,
            start_step=start_step,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            crop=crop_from_config(config, self.train_split),
            balance_labels=labels,
            repeats=config.data.aug_repeats,
            mix_rows=config.augment.mix_rows if mixup.from_config(config).enabled else 0,
            extras=None if logits is None else {"teacher": logits},
        )

    def eval_batches(self) -> PrefetchIterator:
        """This process's batches of one evaluation, prefetched from now on."""
        config = self.config
        size = padded_batch_size(config.eval.batch_size, self.mesh)
        batches = eval_batches(
            self.eval_split,
            batch_size=size,
            image_size=self.model.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=config.data.workers,
            crop_pct=config.eval.crop_pct,
        )
        return PrefetchIterator(batches, count=-(-len(self.eval_split) // size))


def build(
    config: ConfigDict,
    devices: list[jax.Device] | None = None,
    make_objective: MakeObjective = objectives.from_config,
) -> Trainer:
    """Builds everything a run needs. Nothing is compiled yet.

    Args:
      config: see `cait_jax.train.keys`.
      devices: to train on; None: all.
      make_objective: what is learnt; by default what `config.objective` names.

    Raises:
      UserError: for a setting, a data set or a size that does not fit.
    """
    check_values(config)
    _check_dtypes(config)
    mesh = mesh_from_config(config, devices)
    train_split, eval_split = load_splits(config)
    if config.init.fit_head:
        from cait_jax.train.head import check_start

        check_start(config, train_split)
    objective = make_objective(config, train_split)
    check_attention_memory(objective.model)
    logits = None
    if config.distill.logits is not None:
        from cait_jax.train.objectives.distillation import recorded_logits

        logits = recorded_logits(config, len(train_split), train_split.class_names)
    objective = jax.device_put(objective, param_shardings(objective, mesh))
    trainer = assemble(config, mesh, objective, train_split, eval_split, logits)
    state = trainer.abstract_state
    others = (dataclasses.replace(state, params=()), _images(trainer))
    check_memory(state.params, others, list(mesh.devices.flat))
    return trainer


def _images(trainer: Trainer) -> jax.ShapeDtypeStruct:
    """The shape of the larger of the batches of training and of evaluation, as the network takes it."""
    config, model = trainer.config, trainer.model
    size = max(config.batch_size // config.optimizer.grad_accum, config.eval.batch_size)
    shape = (padded_batch_size(size, trainer.mesh), *model.image_size, model.in_channels)
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=batch_sharding(trainer.mesh))


def assemble(
    config: ConfigDict,
    mesh: Mesh,
    objective: Objective,
    train_split: Split,
    eval_split: Split,
    recorded_logits: np.ndarray | None = None,
) -> Trainer:
    """The parts of a run around an objective, whose arrays are on the mesh, or shapes where no step is run.

    Raises:
      UserError: for a setting that does not fit.
    """
    built = optimizer.from_config(config, len(train_split))
    if built.total_steps > INT32:
        raise UserError(
            f"{setting('config.epochs', config.epochs)} makes {built.total_steps:,} steps: give less, for at most "
            f"{INT32:,}"
        )
    settings = config.optimizer
    train_step = make_train_step(
        built.transformation,
        built.schedule,
        seed=config.seed,
        grad_accum=settings.grad_accum,
        ema_decay=settings.ema_decay,
        sam_rho=settings.sam_rho,
        freeze=built.freeze,
    )
    shapes = jax.eval_shape(lambda: _init(config, objective, built))
    if built.freeze is not None:  # refuses a part that the network does not have
        jax.eval_shape(built.freeze, shapes.params, 0)
    state_sharding = param_shardings(shapes, mesh)
    step = jax.jit(
        constrain_batch(train_step, mesh),
        in_shardings=(state_sharding, batch_sharding(mesh), _shardings(objective)),
        out_shardings=(state_sharding, replicated(mesh)),
        donate_argnums=0,
    )
    return Trainer(
        config=config,
        mesh=mesh,
        train_split=train_split,
        eval_split=eval_split,
        objective=objective,
        optimizer=built,
        abstract_state=with_shardings(shapes, state_sharding),
        step=step,
        evaluate=objective.evaluator(mesh),
        recorded_logits=recorded_logits,
    )


def mesh_from_config(config: ConfigDict, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh of a config, which its batch must divide over."""
    sizes = config.mesh
    mesh = make_mesh(devices, data=sizes.data, fsdp=sizes.fsdp, tensor=sizes.tensor)
    check_batch_size(config.batch_size, batch_shards(mesh), config.optimizer.grad_accum)
    return mesh


def mesh_fits(config: ConfigDict, devices: int) -> bool:
    """Whether the mesh of a config, over which its batch must divide, can be made of so many devices."""
    mesh = config.mesh
    try:
        sizes = mesh_sizes(devices, data=mesh.data, fsdp=mesh.fsdp, tensor=mesh.tensor)
        check_batch_size(
            config.batch_size, sizes["data"] * sizes["fsdp"], config.optimizer.grad_accum
        )
    except UserError:
        return False
    return True


def load_splits(
    config: ConfigDict, load: Callable[..., Split] | None = None
) -> tuple[Split, Split]:
    """The splits for training and for evaluation, each by `load`, which is `load_split` if not given.

    Raises:
      UserError: they cannot be read, or do not fit each other or the config.
    """
    load = load or load_split
    data, size = config.data, config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)
    train_split, eval_split = (
        load(data.name, split, image_size=size, data_dir=data.data_dir)
        for split in (data.train_split, data.eval_split)
    )
    if train_split.class_names != eval_split.class_names:
        raise UserError(
            f"splits {data.train_split!r} and {data.eval_split!r} of {data.name} have other classes, so "
            "a label means another class in each: give both the same folders of classes, or add a split "
            "train that has all"
        )
    if config.batch_size > len(train_split):
        raise UserError(
            f"batch_size {config.batch_size} is larger than the {len(train_split)} examples of "
            f"{data.name}'s split {data.train_split!r}: set {setting('config.batch_size')} to at most that"
        )
    for key in ("mean", "std"):
        if len(data[key]) not in (1, train_split.channels):
            raise UserError(
                f"{setting(f'config.data.{key}')} has {len(data[key])} values, and {data.name} has "
                f"{train_split.channels} channel(s): give one value, or one a channel"
            )
    crop_from_config(config, train_split)
    if mixup.from_config(config).enabled:
        warn_of_shared_draws(config.batch_size, config.augment.mix_rows, config.data.aug_repeats)
    return train_split, eval_split


def _check_dtypes(config: ConfigDict) -> None:
    for key in ("dtype", "param_dtype"):
        if config.model[key] == "float64" and jax.dtypes.canonicalize_dtype("float64") != "float64":
            raise UserError(
                f"{setting(f'config.model.{key}', 'float64')} needs JAX's 64-bit mode: set JAX_ENABLE_X64=1, or "
                "choose float32"
            )


def _init(
    config: ConfigDict, objective: Objective, optimizer: Optimizer, params: Any = None
) -> TrainState:
    model = objective.model
    images = jnp.zeros((1, *model.image_size, model.in_channels))
    params, carried = objective.init(jax.random.key(config.seed), images, params)
    ema = config.optimizer.ema_decay > 0
    return create_state(params, optimizer.transformation, ema=ema, carried=carried)


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes and dtypes of a tree of arrays, with a tree of shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        tree,
        shardings,
    )


def _shardings(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, tree)
