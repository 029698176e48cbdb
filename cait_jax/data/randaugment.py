"""RandAugment (Cubuk et al., arXiv 1909.13719) in the form that DeiT and CaiT were trained with.

An operation's strength grows with the magnitude, and what RandAugment leaves to a programmer is as in timm.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, UInt8

from cait_jax.data import pixels
from cait_jax.data.warp import warp
from cait_jax.errors import UserError

Image = UInt8[Array, "height width channels"]

OPERATIONS = (
    "auto_contrast",
    "equalize",
    "invert",
    "posterize",
    "solarize",
    "solarize_add",
    "color",
    "contrast",
    "brightness",
    "sharpness",
    "rotate",
    "shear_x",
    "shear_y",
    "translate_x",
    "translate_y",
)
"""The operations; each is drawn with equal chance."""

FILL = (124, 116, 104)
"""Red, green and blue of what moves in at the borders: ImageNet's mean colour."""

_GEOMETRIC = OPERATIONS[10:]
_MAX_MAGNITUDE = 10.0
_KEYS = {
    "m": "magnitude",
    "n": "count",
    "p": "probability",
    "mstd": "magnitude_std",
    "inc": "increasing",
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
    """How RandAugment draws.

    Attributes:
      magnitude: mean magnitude of an operation, 0 to 10.
      magnitude_std: standard deviation of the magnitude, which is normal and clipped to 0 to 10.
      count: operations drawn for an image, with replacement.
      probability: that a drawn operation is applied.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    count: int = 2
    probability: float = 0.5


def parse_policy(text: str) -> RandAugment:
    """Reads a policy in timm's notation, such as `"rand-m9-mstd0.5-inc1"`.

    The parts after `rand` are `m` (magnitude, 10 if left out), `mstd` (its standard deviation, 0), `n` (operations
    an image, 2), `p` (probability of each, 0.5) and `inc1`, which must be there: it says that strength grows with
    the magnitude.

    Raises:
      UserError: a part is unknown, given twice or out of range, or `inc1` is missing.
    """
    name, *parts = text.split("-")
    if name != "rand":
        raise UserError(
            f"the policy {text!r} is not RandAugment's; write one like 'rand-m9-mstd0.5-inc1'"
        )
    found: dict[str, float] = {}
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in _KEYS:
            raise UserError(
                f"the policy {text!r} has the unknown part {part!r}; the parts are "
                f"{', '.join(_KEYS)}, each followed by a number, as in 'rand-m9-mstd0.5-inc1'"
            )
        if _KEYS[match[1]] in found:
            raise UserError(f"the policy {text!r} has two parts {match[1]}; leave one out")
        found[_KEYS[match[1]]] = float(match[2])
    if found.pop("increasing", 0.0) != 1.0:
        raise UserError(
            f"the policy {text!r} must say inc1: only operations whose strength grows with the "
            "magnitude are there"
        )
    count = found.get("count", 2.0)
    policy = RandAugment(
        magnitude=found.get("magnitude", _MAX_MAGNITUDE),
        magnitude_std=found.get("magnitude_std", 0.0),
        count=int(count),
        probability=found.get("probability", 0.5),
    )
    for key, value, low, high in (
        ("m", policy.magnitude, 0, 10),
        ("mstd", policy.magnitude_std, 0, 100),
        ("p", policy.probability, 0, 1),
    ):
        if not low <= value <= high:
            raise UserError(
                f"the policy {text!r} has {key}{value:g}; {key} must be from {low} to {high}"
            )
    if count != policy.count or not policy.count:
        raise UserError(f"the policy {text!r} has n{count:g}; n must be a whole number from 1 on")
    return policy


def rand_augment(key: PRNGKeyArray, image: Image, policy: RandAugment) -> Image:
    """Applies operations drawn at random to one image, one after the other.

    Args:
      key: of this image.
      image: one image of 1 or 3 channels.
      policy: how to draw.

    Raises:
      UserError: the image has neither 1 nor 3 channels.
    """
    if image.shape[-1] not in (1, 3):
        raise UserError(
            f"RandAugment is for images of 1 or 3 channels, not {image.shape[-1]}; leave it out"
        )
    for draw_key in jax.random.split(key, policy.count):
        operation, applied, magnitude = draw(draw_key, policy)
        # The number after the last operation's stands for none.
        image = apply(image, jnp.where(applied, operation, len(OPERATIONS)), magnitude)
    return image


def draw(key: PRNGKeyArray, policy: RandAugment) -> tuple[Int[Array, ""], Array, Float[Array, ""]]:
    """Draws an operation's index, whether it is applied, and its magnitude, negative in half of the draws."""
    which, whether, how_much, sign = jax.random.split(key, 4)
    magnitude = policy.magnitude + policy.magnitude_std * jax.random.normal(how_much)
    magnitude = jnp.clip(magnitude, 0.0, _MAX_MAGNITUDE)
    return (
        jax.random.randint(which, (), 0, len(OPERATIONS)),
        jax.random.bernoulli(whether, policy.probability),
        jnp.where(jax.random.bernoulli(sign), -magnitude, magnitude),
    )


def apply(
    image: Image, operation: Int[Array, ""] | int, magnitude: Float[Array, ""] | float
) -> Image:
    """Applies one operation to one image.

    With s = magnitude / 10, from -1 to 1: rotate by 30 s degrees counter-clockwise; shear by 0.3 s; translate by
    0.45 s of the side, to the left or up; color, contrast, brightness, sharpness by the factor 1 + 0.9 s, at
    least 0.1. With s without its sign: posterize to 4 - floor(4 s) bits; solarize from 256 - floor(256 s) upwards;
    solarize_add adds floor(110 s).

    Args:
      image: one image of 1 or 3 channels.
      operation: index into `OPERATIONS`; their number for none.
      magnitude: -10 to 10.
    """
    signed = jnp.asarray(magnitude, jnp.float32) / _MAX_MAGNITUDE
    strength = jnp.abs(signed)
    factor = jnp.maximum(0.1, 1 + 0.9 * signed)

    def part(of: int) -> Array:
        return jnp.floor(of * strength).astype(jnp.int32)

    operation = jnp.asarray(operation)
    move = jnp.clip(operation - len(OPERATIONS) + len(_GEOMETRIC), 0, len(_GEOMETRIC) - 1)
    branches = (
        pixels.auto_contrast,
        pixels.equalize,
        pixels.invert,
        lambda image: pixels.posterize(image, 4 - part(4)),
        lambda image: pixels.solarize(image, 256 - part(256)),
        lambda image: pixels.solarize_add(image, part(110)),
        lambda image: pixels.color(image, factor),
        lambda image: pixels.contrast(image, factor),
        lambda image: pixels.brightness(image, factor),
        lambda image: pixels.sharpness(image, factor),
        lambda image: warp(image, _inverses(signed, *image.shape[:2])[move], FILL),
        lambda image: image,
    )
    # All geometric operations are one warp, which is compiled, and where all branches run is made, once.
    branch = jnp.minimum(operation, 10) + (operation == len(OPERATIONS))
    return jax.lax.switch(branch, branches, image)


def _inverses(signed: Array, height: int, width: int) -> Float[Array, "5 2 3"]:
    """Where each geometric operation takes its pixels from, as `warp` wants it."""
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
