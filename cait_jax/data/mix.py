"""Mixup (Zhang et al., arXiv 1710.09412) and CutMix (Yun et al., arXiv 1905.04899) of a batch, in groups of rows.

A group shares one draw, and image i of its n is paired with image n - 1 - i, as timm's `Mixup` does with the
batch of one process. Both functions take the global batch, before it is split into micro batches.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from cait_jax.errors import UserError
from cait_jax.sharding import constrain_replicated

Images = Float[Array, "batch height width channels"]
Labels = Int[Array, "batch"]


@dataclasses.dataclass(frozen=True)
class Mixing:
    """How to mix.

    Attributes:
      mixup: alpha of mixup, whose lambda is Beta(alpha, alpha); 0 for no mixup.
      cutmix: alpha of CutMix, likewise.
      probability: that a group is mixed.
      switch: probability of CutMix, where there are both.
      rows: size of a group, even; the rows that remain form one more group. 0: the whole batch is one group.

    Raises:
      UserError: a value is out of range.
    """

    mixup: float = 0.0
    cutmix: float = 0.0
    probability: float = 1.0
    switch: float = 0.5
    rows: int = 0

    @property
    def enabled(self) -> bool:
        """Whether anything is ever mixed."""
        return bool(self.mixup or self.cutmix) and self.probability > 0

    def __post_init__(self) -> None:
        """Checks the ranges."""
        for name, value in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if value < 0:
                raise UserError(f"the alpha of {name} must be 0 (none) or more, not {value:g}")
        for name, value in (("probability", self.probability), ("switch", self.switch)):
            if not 0 <= value <= 1:
                raise UserError(f"the {name} of mixing must be from 0 to 1, not {value:g}")
        if self.rows < 0 or self.rows % 2:
            raise UserError(
                f"the rows of mixing must be an even number, or 0 for the whole batch, not {self.rows}: in an "
                "odd group one image would be mixed with itself"
            )


def soft_labels(
    labels: Labels, num_classes: int, label_smoothing: float = 0.0
) -> Float[Array, "batch classes"]:
    """Turns class indices into distributions: `1 - smoothing` for the class, `smoothing / classes` more for each.

    Args:
      labels: class indices.
      num_classes: their number.
      label_smoothing: the share of a label spread evenly over all classes, its own included.
    """
    hot = jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)
    return hot * (1.0 - label_smoothing) + label_smoothing / num_classes


def mix(
    key: PRNGKeyArray,
    images: Images,
    targets: Float[Array, "batch classes"],
    settings: Mixing,
) -> tuple[Images, Float[Array, "batch classes"]]:
    """Mixes each group of a global batch with its reverse.

    Args:
      key: the key of the step and purpose; folded with the group's number where there are several.
      images: normalised or not; mixing is linear.
      targets: a distribution over the classes for each image, as by `soft_labels`.
      settings: how to mix.

    Returns:
      The mixed images, of the same dtype, and their targets, mixed in the proportion of the images' pixels.
    """
    if not settings.enabled:
        return images, targets
    count, size = len(images), (images.shape[1], images.shape[2])
    rows = settings.rows or count
    if rows >= count:
        return _mix_group(sample_share(key, size, settings), images, targets)
    groups, rest = divmod(count, rows)
    keys = jax.vmap(lambda group: jax.random.fold_in(key, group))(jnp.arange(groups + bool(rest)))
    # Whole on every device: divided, each turn of a rejection sampler would be an all-reduce.
    drawn = constrain_replicated(jax.vmap(lambda key: sample_share(key, size, settings))(keys))

    def grouped(array: Array) -> Array:
        return array[: groups * rows].reshape(groups, rows, *array.shape[1:])

    of_groups = jax.tree.map(lambda array: array[:groups], drawn)
    mixed = jax.vmap(_mix_group)(of_groups, grouped(images), grouped(targets))
    mixed_images, mixed_targets = (array.reshape(-1, *array.shape[2:]) for array in mixed)
    if rest:
        of_last = jax.tree.map(lambda array: array[-1], drawn)
        last_images, last_targets = _mix_group(of_last, images[-rest:], targets[-rest:])
        mixed_images = jnp.concatenate([mixed_images, last_images])
        mixed_targets = jnp.concatenate([mixed_targets, last_targets])
    return mixed_images, mixed_targets


def _mix_group(drawn: tuple[Array, Array], images: Array, targets: Array) -> tuple[Array, Array]:
    share, kept = drawn
    share = share.astype(images.dtype)[None, :, :, None]
    mixed = share * images + (1 - share) * jnp.flip(images, 0)
    return mixed, kept * targets + (1 - kept) * jnp.flip(targets, 0)


def sample_share(
    key: PRNGKeyArray, size: tuple[int, int], settings: Mixing
) -> tuple[Float[Array, "height width"], Float[Array, ""]]:
    """Draws which share of each pixel an image keeps.

    Mixup keeps the same share, lambda, everywhere; CutMix 0 in a box and 1 around it. The box has the image's
    aspect and the area `1 - lambda`, both sides rounded down, its centre is uniform over the pixels, and what
    would stick out of the image is cut off.

    Args:
      key: the key of the step and purpose.
      size: height and width in pixels.
      settings: how to mix.

    Returns:
      The shares, from 0 to 1, and their mean, which is the share of the label that is kept; float32.
    """
    happens_key, switch_key, mixup_key, cutmix_key, centre_key = jax.random.split(key, 5)
    kept = jnp.ones(())
    share = jnp.ones(size)
    if settings.mixup:
        kept = jax.random.beta(mixup_key, settings.mixup, settings.mixup)
        share = jnp.full(size, kept)
    if settings.cutmix:
        lam = jax.random.beta(cutmix_key, settings.cutmix, settings.cutmix)
        outside = 1.0 - cutmix_box(centre_key, size, lam)
        cut = jax.random.bernoulli(switch_key, settings.switch if settings.mixup else 1.0)
        share = jnp.where(cut, outside, share)
        kept = jnp.where(cut, outside.mean(), kept)
    happens = jax.random.bernoulli(happens_key, settings.probability)
    return jnp.where(happens, share, 1.0), jnp.where(happens, kept, 1.0)


def cutmix_box(
    key: PRNGKeyArray, size: tuple[int, int], lam: Float[Array, ""]
) -> Float[Array, "height width"]:
    """Draws the box that CutMix pastes (arXiv 1905.04899, section 3.1), 1 inside and 0 outside.

    Args:
      key: of the box.
      size: height and width in pixels.
      lam: the part of the image around a box that lies inside whole.
    """
    sides = jnp.array(size)
    box = jnp.floor(jnp.sqrt(1.0 - lam) * sides).astype(jnp.int32)
    start = jax.random.randint(key, (2,), 0, sides) - box // 2

    def covered(axis: int) -> Array:
        place = jnp.arange(size[axis])
        return (place >= start[axis]) & (place < start[axis] + box[axis])

    return (covered(0)[:, None] & covered(1)[None, :]).astype(jnp.float32)
