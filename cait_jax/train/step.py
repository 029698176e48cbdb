"""One training step of any objective: a pure function of (state, batch)."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array

from cait_jax.sharding import reshape

Params = Any
Batch = dict[str, Array]
Keys = dict[str, Array]
Aux = dict[str, Any]
Metrics = dict[str, Array]
Tree = TypeVar("Tree")
GradientOf = Callable[..., tuple[Any, Params]]
Freeze = Callable[[Params, Array], Params]
Evaluate = Callable[..., dict[str, dict[str, float]]]
# Writes something of a step, its parameters and its batch on the mesh.
Record = Callable[[int, Params, Any], None]


@struct.dataclass
class TrainState:
    """What a checkpoint holds. Leaves are arrays, or their shapes and dtypes.

    Attributes:
      step: steps taken, an int32 scalar.
      params: parameters.
      opt_state: state of the Optax chain.
      ema: exponential moving average of the parameters, or an empty dict.
      carried: what the objective carries from step to step and no gradient changes, or an empty dict.
    """

    step: Any
    params: Params
    opt_state: Any
    ema: Any
    carried: Any = struct.field(default_factory=dict)


@runtime_checkable
class Objective(Protocol):
    """What is learnt. A pytree: its arrays, such as a teacher's variables, are arguments of the compiled step.

    It may also have `best_metric`, the name of what the best checkpoint is kept by instead of `"eval/accuracy"`,
    and `evaluated(named, carried)`: from the parameters and their average by name to what is evaluated instead.

    Attributes:
      rngs: names of the random keys that `prepare` and `loss` need.
    """

    rngs: ClassVar[tuple[str, ...]]

    @property
    def model(self) -> Any:
        """The network."""
        ...

    def init(self, key: Array, images: Array, params: Params | None = None) -> tuple[Params, Any]:
        """Parameters, the given ones where there are some, and what is carried (an empty dict if nothing is)."""
        ...

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Augments and mixes the global batch; micro batches are cut from the result."""
        ...

    def loss(
        self, params: Params, carried: Any, batch: Batch, keys: Keys, step: Array
    ) -> tuple[Array, Aux]:
        """The mean loss of a micro batch and `{"metrics": scalars, ...}`, to be averaged over micro batches."""
        ...

    def update(self, carried: Any, params: Params, aux: Aux, step: Array) -> Any:
        """What is carried on, after the optimiser's step to `params`."""
        ...

    def evaluator(self, mesh: Mesh) -> Evaluate:
        """A function of named parameters, batches of the evaluation split and an optional progress callback.

        It gives metrics by the name of the parameters, each batch being used for all of them.
        """
        ...


@runtime_checkable
class Recording(Protocol):
    """An objective that also writes records of its own in the course of a run."""

    def recorder(self, trainer: Any, workdir: Path) -> tuple[int, Record] | None:
        """Steps between records, and what writes one; None: there are none."""
        ...


def training_options(keys: Keys, example_ids: Array) -> dict[str, Any]:
    """What `model.apply` takes beside images where it is trained."""
    rngs = {"dropout": keys["dropout"], "drop_path": keys["drop_path"]}
    return {"train": True, "example_ids": example_ids, "rngs": rngs}


def create_state(
    params: Params, optimizer: optax.GradientTransformation, *, ema: bool, carried: Any = None
) -> TrainState:
    """The state before the first step. The average starts from the initial parameters."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=params if ema else {},
        carried={} if carried is None else carried,
    )


def make_train_step(
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    *,
    seed: int = 0,
    grad_accum: int = 1,
    ema_decay: float = 0.0,
    sam_rho: float = 0.0,
    freeze: Freeze | None = None,
) -> Callable[[TrainState, Batch, Objective], tuple[TrainState, Metrics]]:
    """Builds the step; not jitted.

    Args:
      optimizer: the Optax chain, which follows `schedule`.
      schedule: step to learning rate.
      seed: keys are folded from it and the step.
      grad_accum: micro batches of a step.
      ema_decay: of the average of the parameters; 0: none is kept.
      sam_rho: radius of sharpness-aware minimisation; 0: none.
      freeze: stops the gradient of frozen parameters, given parameters and step; None: everything is trained.

    Returns:
      A function of state, batch and objective that gives the next state and the scalars `loss`, `learning_rate`
      (as applied in this step), `grad_norm` (before clipping), the objective's metrics and `finite`. Where loss
      or gradient are not finite, `finite` is False and the state is the old one with the next number.
    """

    def train_step(
        state: TrainState, batch: Batch, objective: Objective
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        names = objective.rngs
        keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))

        def loss(params: Params, micro: Batch) -> tuple[Array, Aux]:
            if freeze is not None:
                params = freeze(params, state.step)
            return objective.loss(params, state.carried, micro, keys, state.step)

        prepared = objective.prepare(batch, keys)

        def loss_and_gradient(params: Params) -> tuple[tuple[Array, Aux], Params]:
            gradient_of: GradientOf = jax.value_and_grad(loss, has_aux=True)
            return mean_over_micro_batches(partial(gradient_of, params), prepared, grad_accum)

        (value, aux), gradient = loss_and_gradient(state.params)
        if sam_rho:  # around the mean, so that the number of micro batches does not matter
            _, gradient = loss_and_gradient(uphill(state.params, gradient, sam_rho))
        metrics = {
            "loss": value,
            **aux["metrics"],
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "grad_norm": optax.tree.norm(gradient),
        }
        finite = jnp.isfinite(value) & jnp.isfinite(metrics["grad_norm"])

        def update() -> TrainState:
            updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
            params = apply_updates(state.params, updates)
            ema = moving_average(state.ema, params, ema_decay) if ema_decay else state.ema
            carried = objective.update(state.carried, params, aux, state.step)
            return TrainState(state.step, params, opt_state, ema, carried)

        new = jax.lax.cond(finite, update, lambda: state)
        return new.replace(step=state.step + 1), {**metrics, "finite": finite}

    return train_step


def all_finite(tree: Any) -> Array:
    """Whether no number of a pytree's arrays is NaN or infinite: a bool scalar."""
    finite = [jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]
    return jnp.stack(finite).all()


def mean_over_micro_batches(function: Callable[[Batch], Tree], batch: Batch, count: int) -> Tree:
    """The mean of `function` over `count` micro batches, in a scan: the activations of one are live at a time.

    Micro batch i holds the examples i, i + count, i + 2 * count, ...: each device cuts its own rows, and nothing
    moves between devices.

    Args:
      function: of a batch, giving any pytree of arrays.
      batch: arrays with a leading batch axis that `count` divides.
      count: number of micro batches.
    """
    if count == 1:
        return function(batch)

    def accumulate(total: Any, micro: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(micro)), None

    micros = jax.tree.map(
        lambda a: reshape(a, a.shape[0] // count, count, *a.shape[1:]).swapaxes(0, 1), batch
    )
    first = jax.tree.map(lambda array: array[0], micros)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(function, first))
    total, _ = jax.lax.scan(accumulate, zeros, micros)
    mean: Tree = jax.tree.map(lambda leaf: leaf / count, total)
    return mean


def uphill(params: Params, gradient: Params, rho: float) -> Params:
    """`params + rho * g / ||g||`, with one norm over all parameters (SAM, arXiv 2010.01412, algorithm 1).

    The gradient there, of the same batch and keys, is the step's. `rho` is 0.05 in the paper.
    """
    norm = optax.tree.norm(gradient)
    scale = rho / jnp.where(norm > 0, norm, jnp.ones_like(norm))
    return jax.tree.map(lambda p, g: p + (scale * g).astype(p.dtype), params, gradient)


def moving_average(average: Params, params: Params, decay: float | Array) -> Params:
    """One step of the exponential moving average.

    `average + (1 - decay) * (params - average)` keeps the bits of a parameter that never changes;
    `decay * average + (1 - decay) * params` would drift by rounding.
    """

    def move(mean: Array, new: Array) -> Array:
        return jnp.where(new == mean, mean, mean + (1.0 - decay) * (new - mean))

    return jax.tree.map(move, average, params)


def apply_updates(params: Params, updates: Params) -> Params:
    """`optax.apply_updates`, but an update of 0 keeps the parameter's bits.

    A sum does not promise that: processors that flush subnormal numbers turn 1e-42 + 0 into 0.
    """
    return jax.tree.map(
        lambda update, old, new: jnp.where(update == 0, old, new),
        updates,
        params,
        optax.apply_updates(params, updates),
    )
