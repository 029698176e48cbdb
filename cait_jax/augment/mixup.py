"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899), as in timm.

The rows of a group share one draw, and image i of a group of n is paired with image n - 1 - i.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PRNGKeyArray
from ml_collections import ConfigDict

from cait_jax.errors import UserError
from cait_jax.sharding import constrain_replicated, under_automatic_axes

Images = Float[Array, "batch height width channels"]
Targets = Float[Array, "batch classes"]


@dataclasses.dataclass(frozen=True)
class Mixup:
    """Settings of mixup and CutMix, whose lambda is Beta(alpha, alpha)."""

    mixup_alpha: float = 0.0  # 0: no mixup
    cutmix_alpha: float = 0.0  # 0: no CutMix
    prob: float = 1.0  # that a group is mixed
    switch_prob: float = 0.5  # of CutMix, where there are both
    group_size: int = 0  # rows, even; what remains is one more group. 0: the whole batch is one

    def __post_init__(self) -> None:
        """Raises `UserError` where a value is out of range."""
        for name, alpha in (("mixup", self.mixup_alpha), ("cutmix", self.cutmix_alpha)):
            if alpha < 0:
                raise UserError(f"the alpha of {name} must be 0 (none) or more, not {alpha:g}")
        for name, prob in (("prob", self.prob), ("switch_prob", self.switch_prob)):
            if not 0 <= prob <= 1:
                raise UserError(f"{name} of mixup must be from 0 to 1, not {prob:g}")
        if self.group_size < 0 or self.group_size % 2:
            raise UserError(
                "group_size of mixup must be an even number, or 0 for the whole batch, not "
                f"{self.group_size}: in an odd group one image would be mixed with itself"
            )

    @property
    def enabled(self) -> bool:
        """Whether anything is ever mixed."""
        return bool(self.mixup_alpha or self.cutmix_alpha) and self.prob > 0


def from_config(config: ConfigDict) -> Mixup:
    """The settings in a config's `augment` section."""
    augment = config.augment
    return Mixup(
        mixup_alpha=augment.mixup,
        cutmix_alpha=augment.cutmix,
        prob=augment.mixup_prob,
        switch_prob=augment.mixup_switch_prob,
        group_size=augment.mix_rows,
    )


def soft_labels(labels: Int[Array, "batch"], num_classes: int, smoothing: float = 0.0) -> Targets:
    """One-hot labels, of which the share `smoothing` is spread evenly over all classes."""
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    smoothed: Array = optax.losses.smooth_labels(hot, smoothing)
    return smoothed


def mix(
    key: PRNGKeyArray, images: Images, targets: Targets, settings: Mixup
) -> tuple[Images, Targets]:
    """Mixes each group of a global batch, before it is split into micro batches, with its reverse.

    The key is folded with the group's number where there are several groups. Images keep their dtype.
    """
    if not settings.enabled:
        return images, targets
    count, size = len(images), (images.shape[1], images.shape[2])
    rows = settings.group_size or count
    if rows >= count:
        return _mix_group(sample_weights(key, size, settings), images, targets)
    mixed: tuple[Images, Targets] = under_automatic_axes(
        functools.partial(_mix_groups, rows=rows, settings=settings), images, targets, key
    )
    return mixed


def _mix_groups(
    images: Array, targets: Array, key: PRNGKeyArray, *, rows: int, settings: Mixup
) -> tuple[Array, Array]:
    """Mixes each `rows` consecutive images, and what is left over, with their reverse."""
    size = (images.shape[1], images.shape[2])
    groups, rest = divmod(len(images), rows)
    keys = jax.vmap(lambda group: jax.random.fold_in(key, group))(jnp.arange(groups + bool(rest)))
    # Replicated: sharded, each iteration of the rejection sampler would be an all-reduce.
    drawn = constrain_replicated(jax.vmap(lambda key: sample_weights(key, size, settings))(keys))

    def grouped(array: Array) -> Array:
        return array[: groups * rows].reshape(groups, rows, *array.shape[1:])

    whole = jax.tree.map(lambda array: array[:groups], drawn)
    mixed = jax.vmap(_mix_group)(whole, grouped(images), grouped(targets))
    parts = [jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), mixed)]
    if rest:
        last = jax.tree.map(lambda array: array[-1], drawn)
        parts.append(_mix_group(last, images[-rest:], targets[-rest:]))
    mixed_images, mixed_targets = map(jnp.concatenate, zip(*parts, strict=True))
    return mixed_images, mixed_targets


def _mix_group(drawn: tuple[Array, Array], images: Array, targets: Array) -> tuple[Array, Array]:
    weights, lam = drawn
    weights = weights.astype(images.dtype)[None, :, :, None]
    mixed = weights * images + (1 - weights) * jnp.flip(images, 0)
    return mixed, lam * targets + (1 - lam) * jnp.flip(targets, 0)


def sample_weights(
    key: PRNGKeyArray, size: tuple[int, int], settings: Mixup
) -> tuple[Float[Array, "height width"], Float[Array, ""]]:
    """Samples the weight of an image at each pixel, against its partner's, and `lam`, the mean weight.

    With mixup the weight is lambda everywhere, with CutMix 0 in a box (`cutmix_box`) and 1 around it.
    """
    prob_key, switch_key, mixup_key, cutmix_key, box_key = jax.random.split(key, 5)
    lam = jnp.ones(())
    weights = jnp.ones(size)
    if settings.mixup_alpha:
        lam = jax.random.beta(mixup_key, settings.mixup_alpha, settings.mixup_alpha)
        weights = jnp.full(size, lam)
    if settings.cutmix_alpha:
        cutmix_lam = jax.random.beta(cutmix_key, settings.cutmix_alpha, settings.cutmix_alpha)
        outside = 1.0 - cutmix_box(box_key, size, cutmix_lam)
        switch_prob = settings.switch_prob if settings.mixup_alpha else 1.0
        use_cutmix = jax.random.bernoulli(switch_key, switch_prob)
        weights = jnp.where(use_cutmix, outside, weights)
        lam = jnp.where(use_cutmix, outside.mean(), lam)
    mixed = jax.random.bernoulli(prob_key, settings.prob)
    return jnp.where(mixed, weights, 1.0), jnp.where(mixed, lam, 1.0)


def cutmix_box(
    key: PRNGKeyArray, size: tuple[int, int], lam: Float[Array, ""]
) -> Float[Array, "height width"]:
    """Samples CutMix's box (arXiv 1905.04899, section 3.1): 1 inside, 0 outside.

    It has the image's aspect and the area `1 - lam`, sides rounded down; its centre is uniform over the pixels,
    and it is clipped to the image.
    """
    sides = jnp.array(size)
    box = jnp.floor(jnp.sqrt(1.0 - lam) * sides).astype(jnp.int32)
    start = jax.random.randint(key, (2,), 0, sides) - box // 2
    end = start + box
    down, across = jnp.arange(size[0])[:, None], jnp.arange(size[1])[None, :]
    rows = (down >= start[0]) & (down < end[0])
    columns = (across >= start[1]) & (across < end[1])
    return (rows & columns).astype(jnp.float32)
