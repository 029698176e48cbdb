"""The order of augmentation in the training step, and one random key for each image.

An image's key is folded from its position in the global batch, so its draws do not depend on devices, processes or
micro batches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Real
from ml_collections import ConfigDict

from cait_jax.augment import simple
from cait_jax.augment.randaugment import RandAugment, parse_policy, rand_augment
from cait_jax.sharding import shard_over_batch

Images = Real[Array, "batch height width channels"]
Image = Float[Array, "height width channels"]
FloatImages = Float[Array, "batch height width channels"]
Ids = Int[Array, "batch"]
Tree = TypeVar("Tree")

# Images of 224 pixels, each with some ten float32 arrays, that stay in a TPU's on-chip memory.
_TPU_CHUNK = 8


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What is sampled for every image; the defaults turn everything off."""

    hflip: bool = False  # horizontal flip, with probability 1/2
    pad_crop: int = 0  # pixels of zeros on every side before a random crop of the original size
    rotate: float = 0.0  # largest rotation in degrees, either way
    zoom: float = 0.0  # largest relative change of size; 0.1 samples a factor from 0.9 to 1.1
    shear: float = 0.0  # largest horizontal shear, as a fraction of the height
    translate: float = 0.0  # largest shift along both axes, as a fraction of the side
    rand_augment: RandAugment | None = None
    three_augment: bool = False  # DeiT III's grayscale, solarisation or blur
    color_jitter: float = 0.0  # largest relative change of brightness, contrast and saturation


def from_config(config: ConfigDict) -> Augmentation:
    """Reads the keys `augment.*`, of which `augment.rand_augment` is a policy in timm's notation."""
    values = {field.name: config.augment[field.name] for field in dataclasses.fields(Augmentation)}
    policy = values.pop("rand_augment")
    return Augmentation(**values, rand_augment=parse_policy(policy) if policy else None)


def augment(
    key: PRNGKeyArray, images: FloatImages, example_ids: Ids, settings: Augmentation
) -> FloatImages:
    """Augments a batch: crop, affine, flip; then, on 8-bit images, RandAugment, three-augment, colour jitter.

    Images are levels from 0 to 255, with 0 outside; `example_ids` are their positions in the global batch.
    """
    affine = settings.rotate, settings.zoom, settings.shear, settings.translate
    if settings.hflip or settings.pad_crop or any(affine):

        def geometric(key: PRNGKeyArray, image: Array) -> Array:
            crop_key, affine_key, flip_key = jax.random.split(key, 3)
            if settings.pad_crop:
                image = simple.random_pad_crop(crop_key, image, settings.pad_crop)
            if any(affine):
                image = simple.random_affine(affine_key, image, *affine)
            return random_hflip(flip_key, image) if settings.hflip else image

        keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, example_ids)
        images = jax.vmap(geometric)(keys, images)
    if settings.rand_augment or settings.three_augment or settings.color_jitter:
        photometric = functools.partial(_photometric, settings)
        images = per_example_vmap(photometric, key, images, example_ids)
    return images


def _photometric(settings: Augmentation, key: PRNGKeyArray, image: Array) -> Array:
    # The first three keys are those of the geometric operations.
    rand_key, three_key, jitter_key = jax.random.split(key, 6)[3:]
    levels = jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)
    if settings.rand_augment:
        levels = rand_augment(rand_key, levels, settings.rand_augment)
    if settings.three_augment:
        levels = simple.three_augment(three_key, levels)
    if settings.color_jitter:
        levels = simple.color_jitter(jitter_key, levels, settings.color_jitter)
    return levels.astype(image.dtype)


def random_hflip(key: PRNGKeyArray, image: Image) -> Image:
    """Flips one image horizontally with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def normalise(images: Images, mean: Sequence[float], std: Sequence[float]) -> FloatImages:
    """`(images / 255 - mean) / std` in float32; `mean` and `std` have a value for each channel, or one for all."""
    shape = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean).reshape(shape)) / jnp.asarray(std).reshape(shape)


def random_erase(
    key: PRNGKeyArray, images: FloatImages, example_ids: Ids, prob: float = 0.25
) -> FloatImages:
    """Random erasing (Zhong et al., arXiv 1708.04896): of normalised images, a box becomes N(0, 1) noise."""

    def erase(key: PRNGKeyArray, image: Array) -> Any:
        prob_key, box_key, noise_key = jax.random.split(key, 3)

        def put_noise(image: Array) -> Array:
            inside = sample_erasing_box(box_key, (image.shape[0], image.shape[1]))
            noise = jax.random.normal(noise_key, image.shape, image.dtype)
            return jnp.where(inside[..., None], noise, image)

        erased = jax.random.bernoulli(prob_key, prob)
        return jax.lax.cond(erased, put_noise, lambda image: image, image)

    return per_example_vmap(erase, key, images, example_ids) if prob else images


def sample_erasing_box(
    key: PRNGKeyArray,
    size: tuple[int, int],
    *,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
) -> Bool[Array, "height width"]:
    """Samples the box of `random_erase` in an image of `size` (height, width): True inside.

    The first of ten draws that is smaller than the image both ways; if none is, False everywhere. The box's share
    of the image is uniform in `area`, its height over its width log-uniform in `aspect`.
    """
    height, width = size
    area_key, aspect_key, place_key = jax.random.split(key, 3)
    areas = jax.random.uniform(area_key, (10,), minval=area[0], maxval=area[1])
    low, high = math.log(aspect[0]), math.log(aspect[1])
    aspects = jnp.exp(jax.random.uniform(aspect_key, (10,), minval=low, maxval=high))
    heights = jnp.round(jnp.sqrt(areas * height * width * aspects)).astype(jnp.int32)
    widths = jnp.round(jnp.sqrt(areas * height * width / aspects)).astype(jnp.int32)
    fits = (heights < height) & (widths < width)
    first = jnp.argmax(fits)
    box = jnp.stack([heights[first], widths[first]])
    room = jnp.array([height, width]) - box
    top, left = jax.random.randint(place_key, (2,), 0, jnp.maximum(room, 0) + 1)
    down, across = jnp.arange(height)[:, None], jnp.arange(width)[None, :]
    rows = (down >= top) & (down < top + box[0])
    columns = (across >= left) & (across < left + box[1])
    inside: Array = rows & columns & fits[first]
    return inside


def per_example_vmap(
    function: Callable[[PRNGKeyArray, Array], Tree], key: PRNGKeyArray, images: Images, ids: Ids
) -> Tree:
    """Applies `function(key, image)` to each image, with the key folded from its position.

    The function gives an array or a pytree of arrays, which get a leading batch axis.

    A CPU maps sequentially, so that only the taken branch of a `lax.switch` or `lax.cond` is computed. A TPU maps
    chunks that stay in on-chip memory, a GPU the whole batch. On a mesh each device maps its own shard.
    """

    def one(key: PRNGKeyArray, example: tuple[Array, Array]) -> Tree:
        return function(jax.random.fold_in(key, example[0]), example[1])

    def in_turn(ids: Array, images: Array, key: Array, *, batch_size: int | None) -> Any:
        return jax.lax.map(functools.partial(one, key), (ids, images), batch_size=batch_size)

    def at_once(ids: Array, images: Array, key: Array) -> Any:
        return jax.vmap(functools.partial(one, key))((ids, images))

    mapped = functools.partial(
        jax.lax.platform_dependent,
        cpu=functools.partial(in_turn, batch_size=None),
        tpu=functools.partial(in_turn, batch_size=_TPU_CHUNK),
        default=at_once,
    )
    result: Tree = shard_over_batch(mapped, 2)(ids, images, key)
    return result
