"""How far an attribution map can be trusted: deletion and insertion (Petsiuk et al., RISE, arXiv 1806.07421).

Patches are taken away in the order of the map, largest first, or put back in that order, while the class's
probability is read. If the map is right the first curve falls early (a small area) and the second rises early (a
large area). A random map and a blob in the centre score what a map is worth that knows nothing of the network.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from cait_jax.explain.attention import check_transformer, patch_grid
from cait_jax.explain.attribution import Classes, PatchMaps, Variables, attribute
from cait_jax.models.layers import Images

BLUR = 10.0  # standard deviation, in pixels of 224, of the blur that insertion starts from; at least half a patch
BASELINES = ("random", "centre")


class Curves(NamedTuple):
    """Probabilities of each image's class, after no patch, some, and at last all, in equal steps.

    Areas are of the trapezoid rule over the fraction of patches, in [0, 1]. The axes are those of the maps but for
    rows and columns, then that of the classes where several were given for an image.
    """

    deletion: Float[Array, "*axes points"]
    insertion: Float[Array, "*axes points"]

    @property
    def deletion_area(self) -> Float[Array, "*axes"]:
        """Less is better."""
        found: Array = area(self.deletion)
        return found

    @property
    def insertion_area(self) -> Float[Array, "*axes"]:
        """More is better."""
        found: Array = area(self.insertion)
        return found


def deletion_insertion(
    model: Any,
    variables: Variables,
    images: Images,
    classes: Int[Array, "batch *rest"],
    maps: Float[Array, "*kinds batch rows columns"],
    *,
    steps: int = 14,
) -> Curves:
    """Both curves of one map an image, at `steps + 1` points, for its class or for each of several.

    Deletion leads from the image to its mean colour (0, normalised), insertion from the blurred image to the
    image. Patches of equal value go row by row. Several kinds of maps on leading axes share one compiled forward
    pass.
    """
    images = jnp.asarray(images)
    rows, columns = patch_grid(model)
    patches, batch = rows * columns, images.shape[0]
    blurred = blur(images, max(BLUR * max(images.shape[1:3]) / 224, model.patch_size / 2))
    absent = jnp.stack([images, blurred])  # of each curve, the pixels before a patch's turn
    present = jnp.stack([jnp.zeros_like(images), images])  # and after it

    def of_maps(maps: PatchMaps) -> Array:
        order = jnp.argsort(-maps.reshape(batch, patches), axis=1, stable=True)
        rank = jnp.argsort(order, axis=1)  # of each patch, 0 the largest

        def at(point: Array) -> Array:
            curve, step = jnp.divmod(point, steps + 1)
            mask = (rank < jnp.round(step * patches / steps)).reshape(batch, rows, columns)
            mask = jnp.repeat(jnp.repeat(mask, model.patch_size, 1), model.patch_size, 2)[..., None]
            mixed = jnp.where(mask, present[curve], absent[curve])
            return _probability(model, variables, mixed, classes)

        found = jax.lax.map(at, jnp.arange(2 * (steps + 1)))
        return jnp.moveaxis(found.reshape(2, steps + 1, *classes.shape), 1, -1)

    kinds = maps.shape[:-3]
    flat = jax.lax.map(of_maps, maps.reshape(-1, batch, rows, columns))
    deletion, insertion = (
        flat[:, curve].reshape(*kinds, *classes.shape, steps + 1) for curve in range(2)
    )
    return Curves(deletion, insertion)


def compare(
    methods: Sequence[str],
    model: Any,
    variables: Variables,
    images: Images,
    classes: Classes,
    *,
    seed: int = 0,
    steps: int = 14,
) -> dict[str, tuple[PatchMaps, Curves]]:
    """Maps and curves of each method, and of the maps `random` and `centre` on the same images.

    An image's random map is drawn from the seed and its pixels, whatever batch it is in.
    """
    maps = {method: attribute(method, model, variables, images, classes) for method in methods}
    shape = (images.shape[0], *patch_grid(check_transformer(model)))
    maps |= {
        "random": random_maps(images, shape, seed),
        "centre": jnp.broadcast_to(centre_blob(shape[1], shape[2]), shape),
    }
    stacked = jnp.stack(list(maps.values()))
    curves = deletion_insertion(model, variables, images, classes, stacked, steps=steps)
    return {
        name: (found, Curves(curves.deletion[number], curves.insertion[number]))
        for number, (name, found) in enumerate(maps.items())
    }


def summary(curves: Mapping[str, Curves]) -> dict[str, dict[str, float]]:
    """For each method the mean over images, and its standard error, of both areas."""
    return {
        method: _mean("deletion", found.deletion_area) | _mean("insertion", found.insertion_area)
        for method, found in curves.items()
    }


def lead(curves: Mapping[str, Curves], baseline: str = "centre") -> dict[str, dict[str, float]]:
    """As `summary`, of each other method's lead over a baseline on the same image; above 0 it is better.

    Images differ more than methods do, so the error of a paired difference is the smaller one.
    """
    base = curves[baseline]
    return {
        method: _mean("deletion", base.deletion_area - found.deletion_area)
        | _mean("insertion", found.insertion_area - base.insertion_area)
        for method, found in curves.items()
        if method != baseline
    }


def _mean(name: str, areas: Any) -> dict[str, float]:
    areas = np.asarray(areas, np.float64)
    error = areas.std(ddof=1) / np.sqrt(areas.size) if areas.size > 1 else float("nan")
    return {name: float(areas.mean()), f"{name}_error": float(error)}


def random_maps(images: Images, shape: tuple[int, int, int], seed: int) -> PatchMaps:
    """Uniform noise, its key folded from the seed and the sum of an image's values, rounded to thousandths."""
    sums = jnp.round(jnp.asarray(images) * 1000).astype(jnp.int32).sum(axis=(1, 2, 3))
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), sums)
    return jax.vmap(lambda key: jax.random.uniform(key, shape[1:]))(keys)


def centre_blob(rows: int, columns: int) -> Float[Array, "rows columns"]:
    """A Gaussian in the middle, of a quarter of each side."""
    y = (jnp.arange(rows) + 0.5) / rows - 0.5
    x = (jnp.arange(columns) + 0.5) / columns - 0.5
    return jnp.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * 0.25**2))


def blur(images: Images, sigma: float) -> Float[Array, "batch height width channels"]:
    """A Gaussian blur with edge padding, cut off at 3 `sigma` pixels: a matrix product along each side."""
    images = jnp.asarray(images)
    down, across = (
        jnp.asarray(_blur_matrix(side, sigma), images.dtype) for side in images.shape[1:3]
    )
    return jnp.einsum("yh,bhwc,xw->byxc", down, images, across, precision="highest")


def _blur_matrix(side: int, sigma: float) -> Float[np.ndarray, "side side"]:
    """The weight of each pixel of a line (column) in each blurred one (row)."""
    radius = max(1, int(3 * sigma))
    offsets = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (offsets / sigma) ** 2)
    matrix = np.zeros((side, side))
    for offset, tap in zip(offsets, taps / taps.sum(), strict=True):
        read = np.clip(np.arange(side) + offset, 0, side - 1)
        np.add.at(matrix, (np.arange(side), read), tap)
    return matrix


def _probability(
    model: Any, variables: Variables, images: Any, classes: Int[Array, "batch *rest"]
) -> Float[Array, "batch *rest"]:
    probabilities = jax.nn.softmax(model.apply(variables, images))
    flat = classes.reshape(classes.shape[0], -1)
    return jnp.take_along_axis(probabilities, flat, axis=1).reshape(classes.shape)


def area(curve: Float[Array | np.ndarray, "*batch points"]) -> Any:
    """The area under a curve by the trapezoid rule, its points equally far apart from 0 to 1."""
    return (curve[..., 1:] + curve[..., :-1]).mean(axis=-1) / 2
