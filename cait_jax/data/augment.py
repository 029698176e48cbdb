"""Augmentation of fixed-size images inside the jitted training step.

Every function takes one key and one image; `augment` gives each example of a batch a key of its own.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.scipy import ndimage
from jaxtyping import Array, Float, Int, PRNGKeyArray, Real

from cait_jax.data.jitter import color_jitter, three_augment
from cait_jax.data.per_example import for_each_example
from cait_jax.data.randaugment import RandAugment, rand_augment

Image = Float[Array, "height width channels"]


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What to draw for every image; zero turns a part off.

    Attributes:
      flip: mirror left and right, with probability 1/2.
      pad_crop: pixels of padding on every side before a crop at the image's own size.
      rotate: largest rotation in degrees, either way.
      zoom: largest relative change of size; 0.1 draws a factor from 0.9 to 1.1.
      shear: largest horizontal shear, as a fraction of the height.
      translate: largest shift in both directions, as a fraction of the side.
      rand_augment: how RandAugment draws; None for none.
      three_augment: DeiT III's choice of grey, solarised or blurred.
      color_jitter: largest relative change of brightness, contrast and saturation. The recipes leave it
        out beside RandAugment, and have 0.3 after `three_augment`.
    """

    flip: bool = False
    pad_crop: int = 0
    rotate: float = 0.0
    zoom: float = 0.0
    shear: float = 0.0
    translate: float = 0.0
    rand_augment: RandAugment | None = None
    three_augment: bool = False
    color_jitter: float = 0.0

    @property
    def moves(self) -> bool:
        """Whether anything but colours is drawn, RandAugment aside."""
        affine = self.rotate or self.zoom or self.shear or self.translate
        return bool(self.flip or self.pad_crop or affine)

    @property
    def recolours(self) -> bool:
        """Whether anything is drawn that is defined on 8-bit images."""
        return bool(self.rand_augment or self.three_augment or self.color_jitter)


def normalise(
    images: Real[Array, "batch height width channels"],
    mean: Sequence[float],
    std: Sequence[float],
) -> Float[Array, "batch height width channels"]:
    """Maps pixels to float32 `(pixel / 255 - mean) / std`, channel by channel.

    Args:
      images: pixels from 0 to 255, integer or float.
      mean: of each channel, or one value for all, on a scale from 0 to 1.
      std: likewise.
    """
    shape = (1, 1, 1, -1)
    scaled = images.astype(jnp.float32) / 255.0
    return (scaled - jnp.asarray(mean).reshape(shape)) / jnp.asarray(std).reshape(shape)


def augment(
    key: PRNGKeyArray,
    images: Float[Array, "batch height width channels"],
    example_ids: Int[Array, "batch"],
    settings: Augmentation,
) -> Float[Array, "batch height width channels"]:
    """Augments a batch, each image with the key folded from its position in the global batch.

    The order is crop, affine transformation, flip, then RandAugment, `three_augment`, colour jitter. These
    three are defined on 8-bit images, to which pixels are rounded for them.

    Args:
      key: the key of the step.
      images: pixels, from 0 to 255 where one of the last three is drawn. Before them 0 is the background
        that moves in at the borders.
      example_ids: position of each image in the global batch.
      settings: what to draw.

    Returns:
      The augmented images, of the same shape and dtype.
    """

    def moved(example_id: Array, image: Array) -> Array:
        return _move(jax.random.fold_in(key, example_id), image, settings)

    def recoloured(image_key: PRNGKeyArray, image: Array) -> Array:
        return _recolour(image_key, image, settings)

    if settings.moves:
        images = jax.vmap(moved)(example_ids, images)
    if settings.recolours:
        images = for_each_example(recoloured, key, images, example_ids)
    return images


def _move(key: PRNGKeyArray, image: Image, settings: Augmentation) -> Image:
    crop_key, affine_key, flip_key = jax.random.split(key, 3)
    if settings.pad_crop:
        image = random_pad_crop(crop_key, image, settings.pad_crop)
    if settings.rotate or settings.zoom or settings.shear or settings.translate:
        image = random_affine(affine_key, image, settings)
    if settings.flip:
        image = random_flip(flip_key, image)
    return image


def _recolour(key: PRNGKeyArray, image: Image, settings: Augmentation) -> Image:
    # The first three keys are those of `_move`.
    rand_key, three_key, jitter_key = jax.random.split(key, 6)[3:]
    pixels = jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8)
    if settings.rand_augment:
        pixels = rand_augment(rand_key, pixels, settings.rand_augment)
    if settings.three_augment:
        pixels = three_augment(three_key, pixels)
    if settings.color_jitter:
        pixels = color_jitter(jitter_key, pixels, settings.color_jitter)
    return pixels.astype(image.dtype)


def random_flip(key: PRNGKeyArray, image: Image) -> Image:
    """Mirrors the image left to right with probability 1/2."""
    return jnp.where(jax.random.bernoulli(key), image[:, ::-1], image)


def random_pad_crop(key: PRNGKeyArray, image: Image, padding: int) -> Image:
    """Pads every side with `padding` zeros and crops the image's own size at a uniform offset."""
    padded = jnp.pad(image, ((padding, padding), (padding, padding), (0, 0)))
    top, left = jax.random.randint(key, (2,), 0, 2 * padding + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def random_affine(key: PRNGKeyArray, image: Image, settings: Augmentation) -> Image:
    """Rotates, zooms, shears and shifts about the image's centre, bilinearly, zeros outside."""
    angle, zoom, shear, down, right = jax.random.uniform(key, (5,), minval=-1.0, maxval=1.0)
    shift = settings.translate * jnp.stack([down, right])
    return affine(
        image,
        angle=jnp.deg2rad(settings.rotate * angle),
        scale=1.0 + settings.zoom * zoom,
        shear=settings.shear * shear,
        shift=shift * jnp.array(image.shape[:2], image.dtype),
    )


def affine(
    image: Image,
    *,
    angle: Float[Array, ""] | float = 0.0,
    scale: Float[Array, ""] | float = 1.0,
    shear: Float[Array, ""] | float = 0.0,
    shift: Float[Array, "2"] | Sequence[float] = (0.0, 0.0),
) -> Image:
    """Transforms one image about its centre, bilinearly, with zeros outside.

    Args:
      image: one image.
      angle: counter-clockwise rotation in radians, as seen on a screen.
      scale: factor of size; above 1 enlarges.
      shear: columns moved to the right for every row upwards from the centre.
      shift: (down, right) in pixels.

    Returns:
      The image, of the same shape.
    """
    height, width, _ = image.shape
    centre = jnp.array([(height - 1) / 2, (width - 1) / 2])
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Each output pixel looks up where it came from: back through the rotation, then the shear.
    unrotate = jnp.array([[cos, sin], [-sin, cos]])
    unshear = jnp.array([[1.0, 0.0], [shear, 1.0]])
    inverse = unshear @ unrotate / scale
    grid = jnp.stack(jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing="ij"))
    offset = grid.reshape(2, -1) - (centre + jnp.asarray(shift))[:, None]
    source = (inverse @ offset + centre[:, None]).reshape(2, height, width)

    def sample(channel: Array) -> Array:
        return ndimage.map_coordinates(channel, list(source), order=1, mode="constant")

    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)
