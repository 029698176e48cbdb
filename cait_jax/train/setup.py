"""A run's parts, made from its config: data, model, optimiser, compiled functions."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cait_jax.augment import mixup, pipeline
from cait_jax.data.decode import crop_from_config
from cait_jax.data.loader import Batches, PrefetchIterator, eval_batches, train_batches
from cait_jax.data.sources import load_split
from cait_jax.data.split import Split
from cait_jax.errors import UserError, setting
from cait_jax.evaluation.evaluate import (
    evaluate,
    jit_eval_step,
    loss_and_accuracy,
    make_eval_step,
    means,
    zero_sums,
)
from cait_jax.evaluation.labels import read_labels
from cait_jax.models.cait import CaiT
from cait_jax.models.zoo import VARIANTS, create_model
from cait_jax.sharding import (
    batch_sharding,
    batch_shards,
    check_batch_size,
    constrain_batch,
    make_mesh,
    padded_batch_size,
    param_shardings,
    replicated,
)
from cait_jax.train.augmentation import warn_of_shared_draws
from cait_jax.train.config import check_values
from cait_jax.train.learning import length_of, optimizer_of, part_of, phases_of, schedule_of
from cait_jax.train.losses import label_loss, teacher_loss
from cait_jax.train.parts import trainable
from cait_jax.train.phases import Phase, phase_mask
from cait_jax.train.rules import INT32
from cait_jax.train.start import (
    check_teacher_classes,
    given_logits,
    given_params,
    given_teacher,
)
from cait_jax.train.state import TrainState, create_state
from cait_jax.train.step import Recipe, TrainStep, make_train_step


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
      schedule: step to learning rate.
      train_step: the step, jitted, its state donated.
      trace: of the step, from shapes with shardings, such as `abstract_state` and `abstract_batch`: its jaxpr,
        and what lowers and compiles it.
      eval_step: see `make_eval_step`, jitted.
      init: a function without arguments that makes the state of a run from its seed, on the mesh.
      begin: a function of parameters that makes the state of a run that starts from them, on the mesh.
      mesh: the devices.
      teacher_logits: what a teacher said of each training image, where that is recorded.
    """

    config: ConfigDict
    model: CaiT
    train_split: Split
    eval_split: Split
    total_steps: int
    steps_per_epoch: float
    schedule: optax.Schedule
    train_step: TrainStep
    trace: Callable[[Any, Any], jax.stages.Traced]
    eval_step: Callable[..., Any]
    init: Callable[[], TrainState]
    begin: Callable[[Any], TrainState]
    mesh: Mesh
    teacher_logits: Any = None

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.model.image_size

    def batches(self, start_step: int = 0) -> Batches:
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
            crop=crop_from_config(config, self.train_split),
            balance_labels=self._labels if config.data.balanced else None,
            repeats=config.data.aug_repeats,
            mix_rows=config.augment.mix_rows if mixup.from_config(config).enabled else 0,
            extras=None if self.teacher_logits is None else {"teacher": self.teacher_logits},
        )

    @functools.cached_property
    def _labels(self) -> Any:
        return read_labels(self.train_split)

    def start(self) -> TrainState:
        """The state before the first step: from the weights that the config names, or from the seed."""
        params = given_params(self.config, self.model)
        return self.init() if params is None else self.begin(params)

    def eval_batches(self) -> PrefetchIterator:
        """This process's batches of one evaluation, which begin to load at once."""
        size = padded_batch_size(self.config.eval.batch_size, self.mesh)
        batches = eval_batches(
            self.eval_split,
            batch_size=size,
            image_size=self.image_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            workers=self.config.data.workers,
            crop_pct=self.config.eval.crop_pct,
        )
        return PrefetchIterator(batches, count=-(-len(self.eval_split) // size))

    def evaluate(
        self,
        weights: Mapping[str, Any],
        batches: PrefetchIterator,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, dict[str, float]]:
        """Evaluates sets of parameters on the evaluation split, each batch on all of them.

        Args:
          weights: parameters by any name.
          batches: of `eval_batches`; closed at the end.
          progress: called after each batch, when its work is on the devices, with the number of its images.

        Returns:
          Of each set `loss` in nats and `accuracy` from 0 to 1.
        """

        def eval_step(weights: Any, batch: Any, sums: Any) -> Any:
            return {
                name: self.eval_step({"params": params}, batch, sums[name])
                for name, params in weights.items()
            }

        zeros = zero_sums(loss_and_accuracy, self.model.num_classes)
        with batches:
            sums = evaluate(
                eval_step,
                weights,
                batches,
                batch_sharding(self.mesh),
                dict.fromkeys(weights, zeros),
                progress,
            )
        return {name: means(sums[name]) for name in weights}


def set_up(
    config: ConfigDict,
    devices: list[jax.Device] | None = None,
    *,
    split_of: Callable[..., Split] | None = None,
    teacher_of: Callable[[ConfigDict, CaiT], Any] | None = None,
) -> Setup:
    """Makes everything a run needs from its config, and refuses what cannot work.

    Args:
      config: as `cait_jax/train/defaults.py` describes it.
      devices: devices to train on; all of them if not given.
      split_of: what opens a split; `load_split` if not given.
      teacher_of: from config and student to the teacher; `given_teacher` if not given. Its variables may be shapes
        alone, if no step will be run.

    Returns:
      The parts of the run. Nothing is compiled yet.

    Raises:
      UserError: for a setting, a data set or a size that does not fit.
    """
    check_values(config)
    _check_trainable(config.model.name)
    mesh = make_mesh(
        devices, data=config.mesh.data, fsdp=config.mesh.fsdp, tensor=config.mesh.tensor
    )
    check_batch_size(config.batch_size, batch_shards(mesh), config.optimizer.grad_accum)
    size = config.image_size
    size = (size, size) if isinstance(size, int) else tuple(size)

    data = config.data
    train_split, eval_split = (
        (split_of or load_split)(data.name, split, image_size=size, data_dir=data.data_dir)
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
    warn_of_shared_draws(config)
    model: Any = create_model(
        image_size=size,
        num_classes=train_split.num_classes,
        in_channels=train_split.channels,
        **config.model,
    )

    steps_per_epoch = len(train_split) / config.batch_size
    phases = phases_of(config, steps_per_epoch)
    total_steps = length_of(config, phases, steps_per_epoch)
    if total_steps > INT32:
        raise UserError(
            f"{setting('config.epochs', config.epochs)} makes {total_steps:,} steps: give less, for at most "
            f"{INT32:,}"
        )
    schedule = schedule_of(config, phases, total_steps, len(train_split))
    optimizer = optimizer_of(config, schedule, phases)
    recipe = _recipe(config, model, phases)
    teacher = (teacher_of or given_teacher)(config, model)
    check_teacher_classes(config, train_split.class_names)

    def begin(params: Any) -> TrainState:
        return create_state(params, optimizer, ema=recipe.ema_decay > 0)

    def init() -> TrainState:
        images = jnp.zeros((1, *size, model.in_channels))
        return begin(model.init(jax.random.key(config.seed), images)["params"])

    whole, rows = replicated(mesh), batch_sharding(mesh)
    shapes = jax.eval_shape(init)
    if recipe.trainable is not None:  # a part that the network does not have is told now
        recipe.trainable(shapes.params, 0)
    state_lies, teacher_lies = param_shardings(shapes, mesh), param_shardings(teacher, mesh)
    step = jax.jit(
        constrain_batch(make_train_step(model, optimizer, schedule, recipe), mesh),
        in_shardings=(state_lies, rows, teacher_lies),
        out_shardings=(state_lies, whole),
        donate_argnums=0,
    )
    teacher = _put(teacher, teacher_lies)
    return Setup(
        config=config,
        model=model,
        train_split=train_split,
        eval_split=eval_split,
        total_steps=total_steps,
        steps_per_epoch=steps_per_epoch,
        schedule=schedule,
        train_step=lambda state, batch: step(state, batch, teacher),
        trace=lambda state, batch: step.trace(state, batch, teacher),
        eval_step=jit_eval_step(
            make_eval_step(model, recipe.mean, recipe.std, loss_and_accuracy), mesh
        ),
        init=jax.jit(init, out_shardings=state_lies),
        begin=jax.jit(begin, out_shardings=state_lies),
        mesh=mesh,
        teacher_logits=given_logits(config, len(train_split), train_split.class_names),
    )


def _put(tree: Any, shardings: Any) -> Any:
    """The tree on its devices; of shapes, where they would lie."""
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree)):
        return with_shardings(tree, shardings)
    return jax.device_put(tree, shardings)


def _check_trainable(name: str) -> None:
    if name in VARIANTS and not issubclass(VARIANTS[name].network, CaiT):
        raise UserError(
            f"{setting('config.model.name', name)} is here to teach and to predict, not to be trained: its batch "
            "norms keep running averages; choose a transformer, such as cait_xxs24 or deit_small"
        )


def _recipe(config: ConfigDict, model: Any, phases: Sequence[Phase]) -> Recipe:
    distill = config.distill
    part = part_of(config.optimizer.train)
    learns: Callable[[Any, Any], Any] | None = None
    if phases:
        learns = functools.partial(phase_mask, phases)
    elif part != "all":

        def learns(params: Any, step: Any) -> Any:
            del step
            return trainable(params, part)

    return Recipe(
        label_loss=label_loss(config.loss.name, threshold=config.loss.target_threshold),
        teacher_loss=teacher_loss(
            distill.kind, weight=distill.alpha, temperature=distill.temperature
        ),
        seed=config.seed,
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        augmentation=pipeline.from_config(config),
        erase=config.augment.reprob,
        label_smoothing=config.loss.smoothing,
        mixing=mixup.from_config(config),
        trainable=learns,
        sharpness_radius=config.optimizer.sam_rho,
        accumulate=config.optimizer.grad_accum,
        ema_decay=config.optimizer.ema_decay,
    )


def abstract_state(setup: Setup) -> Any:
    """Shapes, dtypes and shardings of the state."""
    shapes = jax.eval_shape(setup.init)
    return with_shardings(shapes, param_shardings(shapes, setup.mesh))


def abstract_batch(setup: Setup) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes, dtypes and shardings of a batch."""
    count, model, lies = setup.config.batch_size, setup.model, batch_sharding(setup.mesh)
    shapes = {
        "image": jax.ShapeDtypeStruct((count, *model.image_size, model.in_channels), jnp.uint8),
        "label": jax.ShapeDtypeStruct((count,), jnp.int32),
    }
    if setup.config.distill.logits is not None:
        shapes["teacher"] = jax.ShapeDtypeStruct((count, model.num_classes), jnp.float32)
    return with_shardings(shapes, dict.fromkeys(shapes, lies))


def with_shardings(tree: Any, shardings: Any) -> Any:
    """Shapes that say how they lie.

    Args:
      tree: arrays or shapes.
      shardings: the same tree of shardings.
    """
    return jax.tree.map(
        lambda leaf, lies: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=lies),
        tree,
        shardings,
    )
