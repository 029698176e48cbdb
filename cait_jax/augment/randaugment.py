"""RandAugment (Cubuk et al., arXiv 1909.13719) as DeiT and CaiT used it: timm's "increasing" operations.

Operations take and give one uint8 image (height, width, channels) of 1 or 3 channels, in the arithmetic of Pillow,
with which the published recipes were trained.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt8

from cait_jax.errors import UserError

Image = UInt8[Array, "height width channels"]
Scalar = Float[Array, ""] | float
Level = Int[Array, ""] | int

# Each is drawn with equal probability.
OPERATIONS = (
    "auto_contrast", "equalize", "invert", "posterize", "solarize", "solarize_add",
    "color", "contrast", "brightness", "sharpness",
    "rotate", "shear_x", "shear_y", "translate_x", "translate_y",
)  # fmt: skip
_FIRST_GEOMETRIC = OPERATIONS.index("rotate")
FILL = (124, 116, 104)  # RGB outside the image after a geometric operation: ImageNet's mean
_MAX_MAGNITUDE = 10.0
_EXAMPLE = "rand-m9-mstd0.5-inc1"


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """Applies each of `num_ops` operations drawn for an image with probability `prob`."""

    magnitude: float = 9.0  # mean of a normal distribution, clipped to 0 to 10
    magnitude_std: float = 0.5
    num_ops: int = 2
    prob: float = 0.5


def parse_policy(text: str) -> RandAugment:
    """Parses timm's notation, such as `"rand-m9-mstd0.5-inc1"`.

    The parts after `rand` are `m` (magnitude, default 10), `mstd` (0), `n` (operations an image, 2), `p`
    (probability of each, 0.5) and `inc1`, which is required: every operation's strength grows with the magnitude.

    Raises:
      UserError: a part is unknown, given twice or out of range, or `inc1` is missing.
    """

    def refused(why: str) -> UserError:
        return UserError(f"the policy {text!r} {why}")

    name, *parts = text.split("-")
    if name != "rand":
        raise refused(f"is not RandAugment's; write one like {_EXAMPLE!r}")
    found = {"m": _MAX_MAGNITUDE, "n": 2.0, "p": 0.5, "mstd": 0.0, "inc": 0.0}
    known, given = ", ".join(found), set()
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in found:
            unknown = f"has the unknown part {part!r}; the parts are {known}"
            raise refused(f"{unknown}, each followed by a number, as in {_EXAMPLE!r}")
        if match[1] in given:
            raise refused(f"has two parts {match[1]}; leave one out")
        given.add(match[1])
        found[match[1]] = float(match[2])
    if found["inc"] != 1.0:
        raise refused(
            "must say inc1: only operations whose strength grows with the magnitude are there"
        )
    for key, most in (("m", 10), ("mstd", 100), ("p", 1)):
        if found[key] > most:
            raise refused(f"has {key}{found[key]:g}; {key} must be from 0 to {most}")
    if not found["n"] or found["n"] % 1:
        raise refused(f"has n{found['n']:g}; n must be a whole number from 1 on")
    return RandAugment(found["m"], found["mstd"], int(found["n"]), found["p"])


def rand_augment(key: PRNGKeyArray, image: Image, policy: RandAugment) -> Image:
    """Applies `policy.num_ops` sampled operations to one image, one after the other."""
    if (count := image.shape[-1]) not in (1, 3):
        raise UserError(f"RandAugment is for images of 1 or 3 channels, not {count}; leave it out")
    for op_key in jax.random.split(key, policy.num_ops):
        operation, applied, magnitude = sample_operation(op_key, policy)
        # The index after the last operation's is the identity.
        image = apply_operation(image, jnp.where(applied, operation, len(OPERATIONS)), magnitude)
    return image


def sample_operation(
    key: PRNGKeyArray, policy: RandAugment
) -> tuple[Int[Array, ""], Bool[Array, ""], Float[Array, ""]]:
    """Samples an index into `OPERATIONS`, whether it is applied, and a magnitude of random sign."""
    op_key, prob_key, magnitude_key, sign_key = jax.random.split(key, 4)
    magnitude = policy.magnitude + policy.magnitude_std * jax.random.normal(magnitude_key)
    magnitude = jnp.clip(magnitude, 0.0, _MAX_MAGNITUDE)
    return (
        jax.random.randint(op_key, (), 0, len(OPERATIONS)),
        jax.random.bernoulli(prob_key, policy.prob),
        jnp.where(jax.random.bernoulli(sign_key), -magnitude, magnitude),
    )


def apply_operation(image: Image, operation: Level, magnitude: Scalar) -> Image:
    """Applies an operation of RandAugment to an image.

    With s = magnitude / 10, from -1 to 1: rotate by 30 s degrees counter-clockwise; shear by 0.3 s; translate by
    0.45 s of the side, to the left or up; color, contrast, brightness, sharpness by the factor 1 + 0.9 s, at
    least 0.1. With |s|: posterize to 4 - floor(4 |s|) bits; solarize from 256 - floor(256 |s|) upwards;
    solarize_add adds floor(110 |s|).

    The operation is an index into `OPERATIONS`, or their number for the identity; the magnitude is -10 to 10.
    """
    signed = jnp.asarray(magnitude, jnp.float32) / _MAX_MAGNITUDE
    strength = jnp.abs(signed)
    factor = jnp.maximum(0.1, 1 + 0.9 * signed)

    def level(most: int) -> Array:
        return jnp.floor(most * strength).astype(jnp.int32)

    operation = jnp.asarray(operation)
    geometric = jnp.clip(operation - _FIRST_GEOMETRIC, 0, len(OPERATIONS) - _FIRST_GEOMETRIC - 1)
    branches = (
        auto_contrast,
        equalize,
        invert,
        lambda image: posterize(image, 4 - level(4)),
        lambda image: solarize(image, 256 - level(256)),
        lambda image: solarize_add(image, level(110)),
        lambda image: color(image, factor),
        lambda image: contrast(image, factor),
        lambda image: brightness(image, factor),
        lambda image: sharpness(image, factor),
        lambda image: warp(image, _inverse_matrices(signed, *image.shape[:2])[geometric], FILL),
        lambda image: image,
    )
    # The geometric operations share one warp: under `vmap` every branch is computed.
    branch = jnp.minimum(operation, _FIRST_GEOMETRIC) + (operation == len(OPERATIONS))
    applied: Array = jax.lax.switch(branch, branches, image)
    return applied


def _inverse_matrices(signed: Array, height: int, width: int) -> Float[Array, "5 2 3"]:
    angle = math.radians(30) * signed
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    x, y = width / 2, height / 2
    zero, one = jnp.zeros(()), jnp.ones(())
    rows = (
        (cos, -sin, x - cos * x + sin * y, sin, cos, y - sin * x - cos * y),
        (one, 0.3 * signed, zero, zero, one, zero),
        (one, zero, zero, 0.3 * signed, one, zero),
        (one, zero, 0.45 * width * signed, zero, one, zero),
        (one, zero, zero, zero, one, 0.45 * height * signed),
    )
    return jnp.stack([jnp.stack(row).reshape(2, 3) for row in rows])


def auto_contrast(image: Image) -> Image:
    """Stretches each channel's levels to 0..255; a constant channel stays.

    Rounds down exactly; Pillow's floating-point quotient may fall just short of an integer.
    """
    low = image.min((0, 1), keepdims=True).astype(jnp.float32)
    high = image.max((0, 1), keepdims=True).astype(jnp.float32)
    # + 0.5 of the numerator's unit keeps a quotient that is an integer from being rounded below it.
    stretched = (255.0 * (image.astype(jnp.float32) - low) + 0.5) / jnp.maximum(high - low, 1.0)
    return jnp.where(high > low, jnp.minimum(stretched, 255.0).astype(jnp.uint8), image)


def equalize(image: Image) -> Image:
    """Equalises each channel's histogram."""

    def equalize_channel(channel: Array) -> Array:
        histogram = jnp.zeros(256, jnp.int32).at[channel.reshape(-1)].add(1)
        step = (channel.size - histogram[channel.max()]) // 255
        below = jnp.cumsum(histogram) - histogram
        table = jnp.minimum((step // 2 + below) // jnp.maximum(step, 1), 255)
        return jnp.where(step > 0, table, jnp.arange(256)).astype(jnp.uint8)[channel]

    return jnp.stack([equalize_channel(image[..., i]) for i in range(image.shape[-1])], axis=-1)


def invert(image: Image) -> Image:
    """255 minus each level."""
    return 255 - image


def posterize(image: Image, bits: Level) -> Image:
    """Keeps the `bits` (0 to 8) most significant bits of each level."""
    return image & (256 - (1 << (8 - jnp.asarray(bits)))).astype(jnp.uint8)


def solarize(image: Image, threshold: Level) -> Image:
    """Inverts the levels from `threshold` (0 to 256) upwards."""
    return jnp.where(image.astype(jnp.int32) < threshold, image, 255 - image)


def solarize_add(image: Image, addend: Level) -> Image:
    """Adds `addend` (0 to 128) to the levels below 128, at most to 255."""
    levels = image.astype(jnp.int32)
    return jnp.where(levels < 128, jnp.minimum(levels + addend, 255), levels).astype(jnp.uint8)


def grayscale(image: Image) -> Image:
    """Luminance (ITU-R 601-2) in every channel."""
    return jnp.broadcast_to(_luminance(image), image.shape).astype(jnp.uint8)


def color(image: Image, factor: Scalar) -> Image:
    """Saturation: 0 gives grayscale, 1 the image."""
    return _blend(grayscale(image), image, factor)


def contrast(image: Image, factor: Scalar) -> Image:
    """0 gives the rounded mean luminance everywhere, 1 the image."""
    luminance = _luminance(image)
    mean = (2 * luminance.sum() + luminance.size) // (2 * luminance.size)
    return _blend(jnp.full(image.shape, mean), image, factor)


def brightness(image: Image, factor: Scalar) -> Image:
    """Multiplies every level by `factor`."""
    return _blend(jnp.zeros_like(image), image, factor)


def sharpness(image: Image, factor: Scalar) -> Image:
    """0 gives the image smoothed by a 3x3 kernel (5/13 in the middle, else 1/13; not the border), 1 the image."""
    levels = image.astype(jnp.int32)
    columns = levels[:-2] + levels[1:-1] + levels[2:]
    total = columns[:, :-2] + columns[:, 1:-1] + columns[:, 2:] + 4 * levels[1:-1, 1:-1]
    smooth = levels.at[1:-1, 1:-1].set((2 * total + 13) // 26)
    return _blend(smooth, image, factor)


def warp(
    image: Image, inverse: Float[Array, "2 3"], fill: tuple[int, int, int] = (0, 0, 0)
) -> Image:
    """Affine transformation, bicubic, as Pillow's `Image.transform`.

    Pixel centres lie at halves; the kernel has a = -1 (Keys, Cubic Convolution Interpolation, 1981); edge pixels
    are repeated; results are rounded towards 0. Coordinates are float32 where Pillow's are float64, so some
    levels differ by one.

    `inverse` maps (x, y, 1) of the result to (x, y) of its source, in pixels. `fill` is the RGB outside, of which
    an image of one channel takes the luminance.
    """
    height, width, channels = image.shape
    across = jnp.arange(width)[None, :] + 0.5
    down = jnp.arange(height)[:, None] + 0.5
    x, y = (row[0] * across + row[1] * down + row[2] for row in inverse)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    columns, column_weights = _cubic_taps(x - 0.5, width)
    rows, row_weights = _cubic_taps(y - 0.5, height)

    # One gather for all channels, packed into the bytes of a word.
    packed: Any = sum(image[..., i].astype(jnp.uint32) << (8 * i) for i in range(channels))
    words = [[packed.reshape(-1)[row * width + column] for column in columns] for row in rows]

    def weighted(weights: Iterable[Array], parts: Iterable[Array]) -> Any:
        return sum(weight * part for weight, part in zip(weights, parts, strict=True))

    def channel(i: int) -> Any:
        levels = [[((word >> 8 * i) & 255).astype(jnp.float32) for word in row] for row in words]
        return weighted(row_weights, [weighted(column_weights, row) for row in levels])

    found = jnp.stack([channel(i) for i in range(channels)], axis=-1)
    outside = jnp.array(fill, jnp.uint8).reshape(1, 1, 3)
    outside = outside if channels == 3 else grayscale(outside)[..., :1]
    return jnp.where(inside[..., None], jnp.clip(found, 0, 255).astype(jnp.uint8), outside)


def _cubic_taps(place: Array, size: int) -> tuple[list[Array], tuple[Array, ...]]:
    """Indices of the four pixels around each place on an axis, and their weights."""
    first = jnp.floor(place)
    d = place - first
    taps = [jnp.clip(first.astype(jnp.int32) + i, 0, size - 1) for i in (-1, 0, 1, 2)]
    weights = (-d * (1 - d) ** 2, 1 + d**2 * (d - 2), d * (1 + d * (1 - d)), d**2 * (d - 1))
    return taps, weights


def _luminance(image: Array) -> Array:
    levels = image.astype(jnp.int32)
    if image.shape[-1] == 1:
        return levels
    red, green, blue = (levels[..., i : i + 1] for i in range(3))
    return (19595 * red + 38470 * green + 7471 * blue + (1 << 15)) >> 16


def _blend(start: Array, image: Array, factor: Scalar) -> Image:
    """`start + factor * (image - start)`, clipped to 0..255 and rounded towards 0."""
    first, second = start.astype(jnp.float32), image.astype(jnp.float32)
    return jnp.clip(first + factor * (second - first), 0, 255).astype(jnp.uint8)
