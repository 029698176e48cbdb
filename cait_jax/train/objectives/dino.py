"""DINO, self-distillation without labels: Caron et al., "Emerging Properties in Self-Supervised Vision
Transformers", arXiv 2104.14294.

From every crop of an image a student predicts the output of its teacher, a moving average of the student, for
another, global crop of that image.
"""

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from cait_jax.augment.crops import View, random_view
from cait_jax.augment.pipeline import normalise, per_example_vmap
from cait_jax.data.split import Split
from cait_jax.errors import UserError, setting
from cait_jax.models.layers import DtypePolicy
from cait_jax.models.variants import VARIANTS
from cait_jax.models.zoo import create_model
from cait_jax.sharding import positions, reshape
from cait_jax.train.objectives import collapse, knn
from cait_jax.train.objectives.projection import ProjectionHead, unit
from cait_jax.train.optimizer import cosine_schedule, steps_of
from cait_jax.train.step import (
    Aux,
    Batch,
    Evaluate,
    Keys,
    Params,
    moving_average,
    training_options,
)
from cait_jax.weights.adapt import interpolate_positions

GLOBAL_CROPS = 2

Outputs = Float[Array, "batch crops outputs"]
Features = Float[Array, "batch crops d"]


@struct.dataclass
class Dino:
    """The objective. A batch has `image` uint8 (batch, h, w, channels); its labels are not read.

    Parameters are `{"backbone": ..., "head": ...}`. What is carried: `teacher`, of the same structure, and
    `center` (outputs,), the moving mean of its outputs.

    Attributes:
      model: the backbone, without a head; its class token is what is projected.
      head: the projection head.
      views: how the two global crops are drawn, and the local ones.
      local_crops: their number.
      mean: of each channel, as `std` on a scale from 0 to 1.
      total_steps: of the run.
      frozen_steps: in which the last layer is not trained.
      student_temp: temperature of the student's softmax.
      teacher_temps: of the teacher's, in step 0 and from `warmup_steps` on.
      teacher_momentum: in step 0.
      center_momentum: of the moving mean.
      koleo: weight of `koleo_loss`.
      bank: the images whose features are neighbours; None: nothing is evaluated.
    """

    model: Any = struct.field(pytree_node=False)
    head: ProjectionHead = struct.field(pytree_node=False)
    views: tuple[View, View, View] = struct.field(pytree_node=False)
    local_crops: int = struct.field(pytree_node=False)
    total_steps: int = struct.field(pytree_node=False)
    mean: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    std: tuple[float, ...] = struct.field(pytree_node=False, default=(0.5,))
    frozen_steps: int = struct.field(pytree_node=False, default=0)
    student_temp: float = struct.field(pytree_node=False, default=0.1)
    teacher_temps: tuple[float, float] = struct.field(pytree_node=False, default=(0.04, 0.04))
    warmup_steps: int = struct.field(pytree_node=False, default=0)
    teacher_momentum: float = struct.field(pytree_node=False, default=0.996)
    center_momentum: float = struct.field(pytree_node=False, default=0.9)
    koleo: float = struct.field(pytree_node=False, default=0.0)
    bank: knn.Bank | None = struct.field(pytree_node=False, default=None)

    rngs: ClassVar[tuple[str, ...]] = ("augment", "dropout", "drop_path")
    best_metric: ClassVar[str] = "eval/knn_accuracy"

    @property
    def seen(self) -> tuple[tuple[Any, int], ...]:
        """Each network that the student is, by image size, and how many images of an example it sees."""
        local = self.model.clone(image_size=self.views[2].size)
        return ((self.model, GLOBAL_CROPS), *[(local, self.local_crops)] * bool(self.local_crops))

    def init(self, key: Array, images: Array, params: Params = None) -> tuple[Params, Any]:
        """The backbone's parameters, unless they are given, and the head's; the teacher starts as the student."""
        backbone_key, head_key = jax.random.split(key)
        if params is None:
            params = self.model.init(backbone_key, images)["params"]
        features = jnp.zeros((1, self.model.width), images.dtype)
        params = {"backbone": params, "head": self.head.init(head_key, features)["params"]}
        center = jnp.zeros((self.head.outputs,), self.head.dtypes.accum_dtype)
        return params, {"teacher": params, "center": center}

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """Draws `global` (batch, 2, h, w, channels) and `local` (batch, n, s, s, channels), uint8 as images."""
        ids = positions(batch["image"])
        first, second, local = self.views

        def draw(key: Array, image: Array) -> dict[str, Array]:
            image = image.astype(jnp.uint8)
            one, two, *rest = jax.random.split(key, GLOBAL_CROPS + self.local_crops)
            crops = {
                "global": jnp.stack(
                    [random_view(one, image, first), random_view(two, image, second)]
                )
            }
            if self.local_crops:
                crops["local"] = jax.lax.map(
                    lambda key: random_view(key, image, local), jnp.stack(rest)
                )
            return crops

        return {**per_example_vmap(draw, keys["augment"], batch["image"], ids), "id": ids}

    def loss(
        self, params: Params, carried: Any, batch: Batch, keys: Keys, step: Array
    ) -> tuple[Array, Aux]:
        """Cross-entropy in nats, and what `update` needs of the teacher's outputs.

        Metrics, of a micro batch: `teacher_entropy`, the mean entropy of the teacher's output for a crop, and
        `mean_entropy`, that of the mean output: both are near 0 where one dimension dominates, near log(outputs)
        where the output is uniform, and nearly equal in either collapse. `feature_std`: see `knn.feature_std`.
        """
        teacher = self._apply(carried["teacher"], batch, "global", None)[1]
        teacher = jax.lax.stop_gradient(teacher)
        probabilities = teacher_probabilities(teacher, carried["center"], self._teacher_temp(step))

        params = self._freeze_last(params, step)
        features, outputs = self._apply(params, batch, "global", keys)
        if self.local_crops:
            local = self._apply(params, batch, "local", keys)[1]
            outputs = jnp.concatenate([outputs, local], axis=1)
        value = dino_loss(outputs, probabilities, self.student_temp)

        mean = probabilities.mean((0, 1))
        directions = unit(jax.lax.stop_gradient(features), axis=-1).mean((0, 1))
        metrics = {
            "teacher_entropy": _entropy(probabilities).mean(),
            "mean_entropy": _entropy(mean),
            "feature_std": jnp.sqrt(jnp.maximum(1 - jnp.square(directions).sum(), 0.0)),
        }
        if self.koleo:
            spread = jnp.stack([koleo_loss(features[:, crop]) for crop in range(GLOBAL_CROPS)])
            metrics["koleo"] = spread.sum()
            value = value + self.koleo * spread.sum()
        return value, {"metrics": metrics, "center": teacher.mean((0, 1))}

    def update(self, carried: Any, params: Params, aux: Aux, step: Array) -> Any:
        """Moves teacher and centre; the centre to the mean output of the whole step (paper, equation 4)."""
        momentum = self._momentum(step).astype(self.model.param_dtype)
        teacher = moving_average(carried["teacher"], params, momentum)
        center = moving_average(carried["center"], aux["center"], self.center_momentum)
        return {"teacher": teacher, "center": center}

    def evaluated(self, named: Mapping[str, Params], carried: Any) -> Mapping[str, Params]:
        """The named parameters that are evaluated: the teacher with its centre."""
        del named
        return {"": {**carried["teacher"], "center": carried["center"]}}

    def evaluator(self, mesh: Mesh) -> Evaluate:
        """`knn_accuracy` of the teacher's features where there are labels, their spread, its output's entropies.

        Of uncropped images, at the temperature after the warm-up. A collapse is logged.
        """
        if self.bank is None:
            return lambda params, batches, progress=None: {name: {} for name in params}
        distribution = functools.partial(_distribution, self.head, self.teacher_temps[1])

        def features(params: Params, images: Array) -> Array:
            found: Any = self.model.apply({"params": params["backbone"]}, images)
            return jnp.asarray(found)

        def judge(params: Params, features: np.ndarray) -> dict[str, float]:
            entropies = collapse.output_entropies(distribution, params, features)
            collapse.warn_of_same_outputs(**entropies, outputs=self.head.outputs)
            return entropies

        return knn.make_evaluator(features, self.bank, mesh, judge)

    def _apply(
        self, params: Params, batch: Batch, name: str, keys: Keys | None
    ) -> tuple[Features, Outputs]:
        """Features and outputs of the crops of a name; without keys in evaluation mode."""
        crops = batch[name]
        batch_size, count, *shape = crops.shape
        images = normalise(reshape(crops, batch_size * count, *shape), self.mean, self.std)
        options: dict[str, Any] = {}
        if keys is not None:  # every crop has draws of its own
            first = 0 if name == "global" else GLOBAL_CROPS
            number = first + jnp.arange(count)[None]
            ids = batch["id"][:, None] * (GLOBAL_CROPS + self.local_crops) + number
            options = training_options(keys, reshape(ids, batch_size * count))
        model, backbone = self.model, params["backbone"]
        if (size := (shape[0], shape[1])) != model.image_size:
            model, backbone = at_size(model, backbone, size)
        features: Any = model.apply({"params": backbone}, images, **options)
        outputs: Any = self.head.apply({"params": params["head"]}, features)
        return (
            reshape(features, batch_size, count, features.shape[-1]),
            reshape(outputs, batch_size, count, outputs.shape[-1]),
        )

    def _freeze_last(self, params: Params, step: Array) -> Params:
        if not self.frozen_steps:
            return params
        kernel = params["head"]["last"]["kernel"]
        kernel = jnp.where(step < self.frozen_steps, jax.lax.stop_gradient(kernel), kernel)
        head = {**params["head"], "last": {"kernel": kernel}}
        return {"backbone": params["backbone"], "head": head}

    def _teacher_temp(self, step: Array) -> Array:
        start, end = self.teacher_temps
        if not self.warmup_steps:
            return jnp.asarray(end)
        return start + (end - start) * jnp.minimum(step / self.warmup_steps, 1.0)

    def _momentum(self, step: Array) -> Array:
        momentum: Array = cosine_schedule(self.teacher_momentum, 1.0, self.total_steps)(step)
        return momentum


def at_size(model: Any, params: Params, size: tuple[int, int]) -> tuple[Any, Params]:
    """A network for images of another size (height, width), its positions interpolated; differentiable."""
    patch = model.patch_size
    old, new = (tuple(side // patch for side in sides) for sides in (model.image_size, size))
    pos_embed = interpolate_positions(params["pos_embed"], old, new)
    return model.clone(image_size=size), {**params, "pos_embed": pos_embed}


def teacher_probabilities(
    outputs: Outputs, center: Float[Array, " outputs"], temperature: Array | float
) -> Outputs:
    """`softmax((outputs - center) / temperature)`: centring holds off one collapse, sharpening the other."""
    centred = outputs - center[None, None]
    return jax.nn.softmax(centred / jnp.asarray(temperature, outputs.dtype), axis=-1)


def dino_loss(
    outputs: Outputs,
    probabilities: Float[Array, "batch global_crops outputs"],
    student_temp: float,
) -> Float[Array, ""]:
    """Mean cross-entropy, in nats, over pairs of a teacher's global crop and another crop (paper, equation 3).

    Args:
      outputs: of the student for all crops, the global ones first.
      probabilities: of the teacher for the global crops.
      student_temp: of the student's softmax.
    """
    logs = jax.nn.log_softmax(outputs / student_temp, axis=-1)
    entropies = -jnp.einsum("bgk,bck->bgc", probabilities, logs, precision="highest")
    shown, crops = entropies.shape[1:]
    other = np.arange(shown)[:, None] != np.arange(crops)[None]
    pairs: Array = jnp.where(other[None], entropies, 0.0).sum((1, 2)) / int(other.sum())
    return pairs.mean()


def _distribution(
    head: ProjectionHead, temperature: float, params: Params, features: Array
) -> Array:
    """A teacher's probabilities (n, outputs) for features (n, d)."""
    outputs: Any = head.apply({"params": params["head"]}, features)
    return teacher_probabilities(outputs[:, None], params["center"], temperature)[:, 0]


def koleo_loss(features: Float[Array, "batch d"]) -> Float[Array, ""]:
    """Kozachenko and Leonenko's estimate of the negative entropy of a batch's directions, but for constants.

    The mean of `-log` of the distance of each to its nearest (Sablayrolles et al., arXiv 1806.03198, equation 2;
    as in DINOv2, arXiv 2304.07193, section 4).
    """
    x = unit(features, axis=-1)
    cosines = jnp.matmul(x, x.T, precision="highest")
    alone = jnp.eye(len(x), dtype=bool)
    nearest = jnp.argmax(jnp.where(alone, -jnp.inf, cosines), axis=1)
    distances = jnp.sqrt(jnp.square(x - x[nearest] + 1e-8).sum(-1))  # of twins not 0
    return -jnp.log(distances + 1e-8).mean()


def _entropy(probabilities: Array) -> Array:
    """Of distributions along the last axis, in nats."""
    return jax.scipy.special.entr(probabilities).sum(-1)


def from_config(config: ConfigDict, split: Split) -> Dino:
    """The objective of a config for a training split.

    Raises:
      UserError: for a network that cannot be trained so, or settings that have no place here.
    """
    _check(config)
    settings, augment = config.dino, config.augment
    model: Any = create_model(
        image_size=config.image_size, num_classes=0, in_channels=split.channels, **config.model
    )
    local_size, patch = settings.local_size, model.patch_size
    if local_size % patch:
        raise UserError(
            f"{setting('config.dino.local_size', local_size)} cannot be cut in patches of {patch} by {patch} "
            f"pixels: give a multiple of {patch}"
        )
    drawn = functools.partial(
        View,
        ratio=tuple(augment.ratio),
        hflip=augment.hflip,
        color_jitter=augment.color_jitter,
    )
    scale = tuple(settings.global_scale)
    second = scale if settings.second_scale is None else tuple(settings.second_scale)
    first_blur, second_blur, local_blur = (1.0, 0.1, 0.5) if settings.blur else (0.0,) * 3
    views = (
        drawn(model.image_size, scale, blur=first_blur),
        drawn(model.image_size, second, blur=second_blur, solarize=0.2),
        drawn((local_size, local_size), tuple(settings.local_scale), blur=local_blur),
    )
    steps_per_epoch = len(split) / config.batch_size
    return Dino(
        model=model,
        head=ProjectionHead(
            settings.head_hidden,
            settings.bottleneck,
            settings.out_dim,
            DtypePolicy(model.dtype, model.param_dtype, model.precision),
        ),
        views=views,
        local_crops=settings.local_crops,
        total_steps=steps_of(config, len(split)),
        mean=tuple(config.data.mean),
        std=tuple(config.data.std),
        frozen_steps=math.ceil(settings.freeze_last_epochs * steps_per_epoch),
        student_temp=settings.student_temp,
        teacher_temps=(settings.teacher_temp_start, settings.teacher_temp),
        warmup_steps=round(settings.teacher_temp_epochs * steps_per_epoch),
        teacher_momentum=settings.teacher_momentum,
        center_momentum=settings.center_momentum,
        koleo=settings.koleo,
        bank=knn.bank_from_config(config, split, model),
    )


def _check(config: ConfigDict) -> None:
    """Refuses what has no meaning without labels, or is not there for a network with a projection head."""
    name = config.model.name
    if name in VARIANTS and VARIANTS[name].family == "RegNetY":
        raise UserError(
            f"{setting('config.model.name', name)} has batch norms, whose running averages are not trained: "
            "choose a transformer, such as cait_xxs24 or deit_small"
        )
    augment, optimizer = config.augment, config.optimizer
    off: Mapping[str, tuple[Any, Any]] = {
        "distill.kind": (config.distill.kind, "none"),
        "augment.rand_augment": (augment.rand_augment, ""),
        "augment.three_augment": (augment.three_augment, False),
        "augment.pad_crop": (augment.pad_crop, 0),
        "augment.rotate": (augment.rotate, 0.0),
        "augment.zoom": (augment.zoom, 0.0),
        "augment.shear": (augment.shear, 0.0),
        "augment.translate": (augment.translate, 0.0),
        "augment.reprob": (augment.reprob, 0.0),
        "augment.mixup": (augment.mixup, 0.0),
        "augment.cutmix": (augment.cutmix, 0.0),
        "optimizer.ema_decay": (optimizer.ema_decay, 0.0),
        "optimizer.train": (optimizer.train, "all"),
        "optimizer.layer_decay": (optimizer.layer_decay, 1.0),
        "phases.head_epochs": (config.phases.head_epochs, 0.0),
        "report.inspect_every": (config.report.inspect_every, 0),
    }
    for key, (value, none) in off.items():
        if value != none:
            raise UserError(
                f"{setting(f'config.{key}', value)} has no place in {setting('config.objective', 'dino')}: set "
                f"it to {none if none != '' else 'nothing'}"
            )
    if optimizer.name == "lamb":
        raise UserError(
            f"{setting('config.optimizer.name', 'lamb')} has no trust ratios for the blocks of a backbone beside "
            "a projection head: choose adamw, lion, muon or sgd"
        )
    if config.dino.koleo and optimizer.grad_accum > 1:
        raise UserError(
            f"{setting('config.dino.koleo')} compares the images of a whole step, and "
            f"{setting('config.optimizer.grad_accum', optimizer.grad_accum)} divides it: set the first to 0 or "
            "the second to 1"
        )
