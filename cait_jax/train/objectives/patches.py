"""Images as patches and back; which of them are visible, and where they are."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Shaped

from cait_jax.sharding import reshape

Images = Float[Array, "batch height width channels"]
Patches = Float[Array, "batch patches pixels"]
Order = Int[Array, "batch patches"]

_EPSILON = 1e-6  # of a patch's variance, as in the published code of MAE


def shuffle(key: Array, example_ids: Int[Array, "batch"], patches: int) -> Order:
    """A permutation of each example's patches, the visible ones in front, by the key folded with its id."""

    def one(example_id: Array) -> Array:
        return jax.random.permutation(jax.random.fold_in(key, example_id), patches)

    return jax.vmap(one)(example_ids)


def ranks(order: Order) -> Order:
    """Where each patch is in `order`: the inverse permutation."""
    return jnp.argsort(order, axis=-1)


def patchify(images: Images, side: int) -> Patches:
    """The pixels of each patch, row by row, channels innermost; patches row by row."""
    batch, height, width, channels = images.shape
    rows, columns = height // side, width // side
    windows = reshape(images, batch, rows, side, columns, side, channels)
    return reshape(jnp.swapaxes(windows, 2, 3), batch, rows * columns, side * side * channels)


def unpatchify(
    patches: Shaped[Array, "batch patches pixels"], size: tuple[int, int], side: int
) -> Array:
    """The images, of `size` (height, width), that `patchify` cuts into these patches."""
    batch, rows, columns = len(patches), size[0] // side, size[1] // side
    windows = reshape(patches, batch, rows, columns, side, side, -1)
    return reshape(jnp.swapaxes(windows, 2, 3), batch, *size, windows.shape[-1])


def normalise_patches(patches: Patches) -> Patches:
    """Each patch less its mean, over its standard deviation."""
    mean, deviation = patch_statistics(patches)
    return (patches - mean) / deviation


def patch_statistics(patches: Patches) -> tuple[Array, Array]:
    """Mean and standard deviation of each patch, (batch, patches, 1); over n - 1, as in the published code."""
    mean = patches.mean(axis=-1, keepdims=True)
    count = max(patches.shape[-1] - 1, 1)
    variance = jnp.square(patches - mean).sum(axis=-1, keepdims=True) / count
    return mean, jnp.sqrt(variance + _EPSILON)


def sin_cos(rows: int, columns: int, width: int) -> Float[np.ndarray, "patches width"]:
    """Fixed positions of a grid, row by row: sines and cosines of the row, then of the column, float64.

    Each is that of Vaswani et al., arXiv 1706.03762, section 3.5, with half of the channels; `width` is a multiple
    of 4.
    """
    frequencies = 10_000.0 ** -(np.arange(width // 4) / (width // 4))

    def along(coordinates: np.ndarray) -> np.ndarray:
        angles = coordinates.reshape(-1, 1) * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

    row, column = np.meshgrid(np.arange(rows), np.arange(columns), indexing="ij")
    return np.concatenate([along(row), along(column)], axis=1)
