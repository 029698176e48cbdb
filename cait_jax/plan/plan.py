"""Memory, work and least time of a config's training step on a target topology."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from cait_jax.data.sources import find_builder, is_folder, is_generated, load_split
from cait_jax.data.split import Encoded, Split
from cait_jax.errors import UserError, setting
from cait_jax.kernels import DEFAULT_ATTENTION
from cait_jax.models.inspect import abstract_variables, macs, macs_of, residual_bytes
from cait_jax.models.zoo import create_model
from cait_jax.plan.compile import (
    Largest,
    abstract_batch,
    cache_folder,
    compile_cached,
    largest_batch,
    tpu_devices,
    trace,
)
from cait_jax.plan.gpu import gpu_devices, has_compiler
from cait_jax.plan.hlo import Collective, collectives, read_program
from cait_jax.plan.roofline import Roofline, Topology, kernel_launches, roofline, traffic_by_origin
from cait_jax.sharding import AXES, check_batch_size, local_bytes, param_shardings
from cait_jax.train import objectives
from cait_jax.train.config import check_values
from cait_jax.train.setup import (
    Trainer,
    assemble,
    load_splits,
    mesh_from_config,
    with_shardings,
)
from cait_jax.weights.pretrained import preprocessing

_EXAMPLES = 1_281_167  # of ImageNet-1k; the length of the schedule hangs on it, no shape does

Say = Callable[[str], Any]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a step needs, on each chip where nothing else is said."""

    topology: Topology
    batch_size: int  # on all chips
    compiled: bool  # by the chip's compiler; otherwise everything but `operations` is an estimate
    state: int  # bytes of parameters, optimiser state and averages
    memory: int  # bytes of a step
    fits: bool
    operations: (
        float  # in a step: two for a multiply-accumulate, teacher and rematerialisation included
    )
    useful: float  # three times the trained networks' forward passes
    traffic: int | None  # bytes to and from HBM; None if the program does not fit
    exchanged: tuple[Collective, ...] | None  # None if the program does not fit
    largest: Largest | None = None  # None if not asked for
    seconds: float = 0.0  # of compilation
    origins: Mapping[str, int] | None = (
        None  # of `traffic`, see `traffic_by_origin`; None if not compiled
    )
    kernels: int | None = None  # launched in a step, on compiled GPUs

    @property
    def by_chip(self) -> float:
        """Images on each chip."""
        return self.batch_size / self.topology.chips

    @property
    def roofline(self) -> Roofline | None:
        """The step's bounds; None if the program does not fit."""
        if self.traffic is None or self.exchanged is None:
            return None
        return roofline(
            self.topology,
            operations=self.operations,
            traffic=float(self.traffic),
            exchanged=self.exchanged,
        )

    @property
    def utilisation(self) -> float | None:
        """Model FLOPs utilisation in the step's least time."""
        bounds = self.roofline
        if bounds is None:
            return None
        return self.useful / (bounds.seconds * self.topology.chip.operations)


def make_plan(
    config: ConfigDict,
    topology: Topology,
    *,
    largest: bool = False,
    estimate: bool = False,
    folder: Path | None = None,
    say: Say = lambda message: None,
) -> Plan:
    """Plans the training step of a config, whose data and teacher's weights need not be on this machine.

    The step is compiled ahead of time, as training would compile it. For GPUs it is traced and counted where
    JAX's CUDA plugin is not installed, which `say` is told.

    Args:
      largest: whether to look for the largest batch, by compiling two or three more sizes.
      estimate: whether to trace and count for GPUs in any case.
      folder: cache of compiled programs; by default `cache_folder()`.
      say: called with progress before what takes minutes.

    Raises:
      UserError: the config does not fit itself or the chips, or the compiler is missing or fails.
    """
    shares = _shares(config, topology)
    check_batch_size(config.batch_size, shares, config.optimizer.grad_accum)
    folder = folder or cache_folder()
    on_gpu = topology.chip.family == "gpu"
    if estimate and not on_gpu:
        raise UserError(f"--estimate is for GPUs: leave it out for {topology}")
    if on_gpu and not estimate and not has_compiler():
        say('an estimate; to compile the step, pip install "cait-jax[plan-gpu]"')
        estimate = True
    planned = _estimate if estimate else _compile
    plan = planned(config, topology, folder, say)
    if not largest:
        return plan

    def memory_of(by_chip: int) -> float:
        other = config.copy_and_resolve_references()
        other.batch_size = by_chip * topology.chips
        say(f"{other.batch_size:,} images a step, {by_chip} a chip")
        return float(planned(other, topology, folder, say).memory)

    whole = shares * config.optimizer.grad_accum
    multiple = whole // math.gcd(whole, topology.chips)
    start = max(multiple, config.batch_size // topology.chips // multiple * multiple)
    capacity = topology.chip.memory
    found = largest_batch(memory_of, capacity, start, multiple=multiple)
    return dataclasses.replace(plan, largest=found)


def _shares(config: ConfigDict, topology: Topology) -> int:
    """Into how many shards a batch is divided."""
    _, tensor = _sizes(config, topology)
    return topology.chips // tensor


def _trainer(config: ConfigDict, devices: list[jax.Device], family: str) -> Trainer:
    """The parts of a run whose data and teacher are shapes."""
    if config.model.attention is None:  # the target's default, not this machine's
        config = config.copy_and_resolve_references()
        config.model.attention = DEFAULT_ATTENTION.get(family, "xla")
    check_values(config)
    mesh = mesh_from_config(config, devices)
    train_split, eval_split = load_splits(config, abstract_split)
    options = {"teacher": _abstract_teacher} if config.objective == "supervised" else {}
    objective = objectives.from_config(config, train_split, **options)
    objective = with_shardings(objective, param_shardings(objective, mesh))
    return assemble(config, mesh, objective, train_split, eval_split)


def _abstract_teacher(config: ConfigDict, model: Any) -> Any:
    from cait_jax.train.objectives.distillation import make_teacher_for

    if config.distill.logits is not None:
        return None
    name = config.distill.teacher
    teacher = create_model(name)
    return make_teacher_for(
        config, model, teacher, abstract_variables(teacher), preprocessing(name)
    )


def _compile(config: ConfigDict, topology: Topology, folder: Path, say: Say) -> Plan:
    on_gpu = topology.chip.family == "gpu"
    devices = gpu_devices(topology) if on_gpu else tpu_devices(topology)
    trainer = _trainer(config, devices, topology.chip.family)
    state, batch = trainer.abstract_state, abstract_batch(trainer)
    traced = trace(trainer)
    held = local_bytes(state)
    found = compile_cached(traced.lower(), topology, folder, held + local_bytes(batch), say)
    program = None if found.refused else read_program(found.text)
    origins = None if program is None else traffic_by_origin(program)
    return Plan(
        topology=topology,
        batch_size=config.batch_size,
        compiled=True,
        state=held,
        memory=found.memory,
        fits=not found.refused and found.memory <= topology.chip.memory,
        operations=2 * macs_of(traced.jaxpr.jaxpr) / topology.chips,
        useful=_useful(trainer, topology),
        traffic=None if origins is None else sum(origins.values()),
        exchanged=None if program is None else tuple(collectives(program)),
        seconds=found.seconds,
        origins=origins,
        kernels=kernel_launches(program) if on_gpu and program is not None else None,
    )


def _useful(trainer: Trainer, topology: Topology) -> float:
    images: int = trainer.config.batch_size
    if seen := _seen(trainer):
        forward = sum(count * macs(model) for model, count in seen) * images
    else:
        loss, params = _loss_of(trainer, images)
        forward = macs_of(jax.make_jaxpr(loss)(params).jaxpr)
    return 3 * 2 * forward / topology.chips


def _seen(trainer: Trainer) -> tuple[tuple[Any, int], ...]:
    """The networks that are trained, and how many images of an example each sees; empty if not whole images."""
    if trainer.config.objective == "supervised" and not trainer.config.lora.rank:
        return ((trainer.model, 1),)
    seen: tuple[tuple[Any, int], ...] = getattr(trainer.objective, "seen", ())
    return seen


def _kept(trainer: Trainer, images: int) -> int:
    """Bytes that plain JAX keeps for the backward pass, parameters included."""
    if seen := _seen(trainer):
        return sum(residual_bytes(model, count * images) for model, count in seen)
    loss, params = _loss_of(trainer, images)
    backward = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))


def _loss_of(trainer: Trainer, images: int) -> tuple[Callable[[Any], Any], Any]:
    """The loss of so many images as a function of parameters, to be traced on one device; and their shapes."""
    objective, state = trainer.objective, trainer.abstract_state
    batch = {
        name: jax.ShapeDtypeStruct((images, *leaf.shape[1:]), leaf.dtype)
        for name, leaf in abstract_batch(trainer).items()
    }

    def zeros(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)

    def loss(params: Any) -> Any:
        keys = dict.fromkeys(objective.rngs, jax.random.key(0))
        micro = objective.prepare(zeros(batch), keys)
        return objective.loss(params, zeros(state.carried), micro, keys, jnp.int32(0))[0]

    return loss, jax.eval_shape(lambda: zeros(state.params))


def _estimate(config: ConfigDict, topology: Topology, folder: Path, say: Say) -> Plan:
    """Of chips whose compiler is not here: the work of one device with its shard of the batch.

    Memory is the state, the gradient and what plain JAX keeps for the backward pass; with rematerialised blocks,
    one of them whole. Traffic is writing and reading what the backward pass needs once each, and state and
    gradient twice. Gradients are all-reduced; under fsdp each parameter is gathered in both passes.
    """
    del folder, say
    fsdp, tensor = _sizes(config, topology)
    local = config.copy_and_resolve_references()
    local.batch_size = max(1, config.batch_size // (topology.chips // tensor))
    local.mesh.data, local.mesh.fsdp, local.mesh.tensor = 1, 1, 1
    trainer = _trainer(local, jax.devices()[:1], topology.chip.family)
    state, batch = trainer.abstract_state, abstract_batch(trainer)
    params = local_bytes(state.params) // tensor
    held, gradient = local_bytes(state) // (fsdp * tensor), params // fsdp

    micro = max(1, local.batch_size // config.optimizer.grad_accum)
    rematerialised, plain = local.model.remat != "none", trainer
    if rematerialised:
        without = local.copy_and_resolve_references()
        without.model.remat = "none"
        plain = _trainer(without, jax.devices()[:1], topology.chip.family)
    needed = max(0, _kept(plain, micro) // tensor - params)
    kept = needed
    if rematerialised:
        kept = max(0, _kept(trainer, micro) // tensor - params) + needed // trainer.model.depth
    memory = held + gradient + kept + local_bytes(batch)

    data = topology.chips // (fsdp * tensor)
    inner, outer = fsdp * tensor, topology.chips
    exchanged = [
        Collective("all-reduce", (), gradient, 1, data, outer),
        Collective("all-gather", (), params, 2, fsdp, inner),
        Collective("reduce-scatter", (), gradient, 1, fsdp, inner),
    ]
    return Plan(
        topology=topology,
        batch_size=config.batch_size,
        compiled=False,
        state=held,
        memory=memory,
        fits=memory <= topology.chip.memory,
        operations=2 * macs_of(trace(trainer).jaxpr.jaxpr) / tensor,
        useful=_useful(trainer, dataclasses.replace(topology, shape=(1, 1))) / tensor,
        traffic=2 * config.optimizer.grad_accum * needed + 2 * (held + gradient),
        exchanged=tuple(each for each in exchanged if each.group > 1),
    )


def _sizes(config: ConfigDict, topology: Topology) -> tuple[int, int]:
    """Of the mesh axes `fsdp` and `tensor`."""
    sizes = {axis: config.mesh[axis] for axis in AXES}
    known = math.prod(size for size in sizes.values() if size != -1)
    if topology.chips % known:
        raise UserError(
            f"a mesh of {known} devices does not divide the {topology.chips} chips of {topology}: change "
            f"{setting('config.mesh.fsdp')} or {setting('config.mesh.tensor')}"
        )
    filled = topology.chips // -math.prod(sizes.values())
    return tuple(filled if sizes[axis] == -1 else sizes[axis] for axis in ("fsdp", "tensor"))


@dataclasses.dataclass(frozen=True)
class AbstractRecords:
    """The records of a split without their content."""

    count: int

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Refused."""
        raise UserError(f"image {index} stands for one that is elsewhere")


def abstract_split(
    name: str, split: str, *, image_size: tuple[int, int], data_dir: str | None = None
) -> Split:
    """Stands for `load_split`: the classes and channels of a data set that need not be on this machine.

    TFDS's data sets are known by their code; folders must be there.

    Raises:
      UserError: the name is unknown, or the folder is not there.
    """
    if is_generated(name) or is_folder(name):
        return load_split(name, split, image_size=image_size, data_dir=data_dir)
    features = dict(find_builder(name, None).info.features.items())
    classes = getattr(features.get("label"), "num_classes", None)
    if not classes or "image" not in features:
        raise UserError(f"data set {name} does not pair an 'image' with a class 'label'")
    channels = 1 if features["image"].shape[-1] == 1 else 3
    return Encoded(AbstractRecords(_EXAMPLES), tuple(map(str, range(classes))), channels)
