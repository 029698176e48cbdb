"""Images on which an exported network is compared with the one it was made of."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.augment.pipeline import normalise
from cait_jax.errors import UserError
from cait_jax.export.forward import Exported

# Of the largest output in absolute value, by the dtype of the computation.
TOLERANCE = {"float32": 1e-5, "bfloat16": 5e-2}
MOST_PHOTOGRAPHS = 16
_NOISE = 2  # images of independent pixels


@dataclasses.dataclass(frozen=True)
class Probes:
    """Images and the outputs of the original for them.

    Attributes:
      images: as the exported function takes them, noise first.
      outputs: by name, each with the images' axis first.
      what: in words.
    """

    images: np.ndarray
    outputs: dict[str, np.ndarray]
    what: str


def make_probes(exported: Exported, photographs: Sequence[Path]) -> Probes:
    """Noise, and crops of the first `MOST_PHOTOGRAPHS` photographs; without any, two drawn pictures.

    Raises:
      UserError: a photograph cannot be read, or the preprocessing of the model is not known.
    """
    rng = np.random.default_rng(0)
    shape = exported.image_shape
    chosen = photographs[:MOST_PHOTOGRAPHS]
    if chosen and exported.preprocessing is None:
        raise UserError(
            "photographs need the model's preprocessing, which is not known: save it with it"
        )
    crops = (
        exported.preprocessing.crops(chosen)
        if chosen and exported.preprocessing is not None
        else np.stack([_smooth(rng, shape) for _ in range(_NOISE)])
    )
    if exported.uint8:
        noise = rng.integers(0, 256, (_NOISE, *shape), dtype=np.uint8)
        images = np.concatenate([noise, crops])
    else:
        known = exported.preprocessing
        normalisation = ((0.5,), (0.25,)) if known is None else (known.mean, known.std)
        normal = rng.standard_normal((_NOISE, *shape), np.float32)
        images = np.concatenate([normal, np.asarray(normalise(jnp.asarray(crops), *normalisation))])
    kind = ("photograph" if chosen else "drawn picture") + "s" * (len(crops) > 1)
    forward = jax.jit(exported.function)
    parts = [forward(exported.variables, image[None]) for image in images]
    outputs = {
        name: np.concatenate([np.asarray(part[i], np.float32) for part in parts])
        for i, name in enumerate(exported.output_names)
    }
    return Probes(images, outputs, f"{_NOISE} images of noise and {len(crops)} {kind}")


def difference(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rows: slice = slice(None)
) -> float:
    """The largest difference of any output, relative to the largest number of that output; infinite for NaN."""
    worst = 0.0
    for name, wanted in expected.items():
        each = float(np.max(np.abs(found[name] - wanted[rows])) / np.max(np.abs(wanted)))
        worst = max(worst, each if np.isfinite(each) else np.inf)
    return worst


def check_difference(exported: Exported, value: float, where: str) -> None:
    """Refuses an export that differs by more than `TOLERANCE` of its dtype.

    Raises:
      UserError: naming the difference.
    """
    allowed = TOLERANCE[np.dtype(exported.model.dtype).name]
    if not value <= allowed:
        raise UserError(
            f"in {where} the exported network differs from the original by {value:.1e} of the largest output, "
            f"more than {allowed:.0e}, so nothing was written: please report it with the model's name"
        )


def _smooth(rng: np.random.Generator, shape: tuple[int, int, int]) -> np.ndarray:
    """A picture of 6 by 6 random colours, enlarged bilinearly: uint8 (height, width, channels)."""
    height, width, channels = shape
    coarse = rng.uniform(0, 255, (6, 6, channels))
    rows, columns = np.linspace(0, 5, height), np.linspace(0, 5, width)

    def between(values: Any, at: np.ndarray) -> Any:
        low = np.minimum(at.astype(int), 4)
        part = (at - low).reshape(-1, *[1] * (values.ndim - 1))
        return values[low] * (1 - part) + values[low + 1] * part

    enlarged = between(np.swapaxes(between(coarse, rows), 0, 1), columns)
    picture: np.ndarray = np.swapaxes(enlarged, 0, 1).astype(np.uint8)
    return picture
