"""Weights made from others: for another image size, patch size or number of classes; means of several."""

import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cait_jax.errors import Literal, UserError, Way, advise
from cait_jax.models.inspect import abstract_variables
from cait_jax.sharding import leaf_shapes
from cait_jax.weights.timm_names import timm_names, to_timm

_POSITIONS = "pos_embed"
_KERNEL = "patch_embed.proj.weight"


def resize_pos_embed(
    pos_embed: Float[np.ndarray | Array, "1 old d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    antialias: bool = False,
    num_prefix_tokens: int = 0,
) -> Float[np.ndarray, "1 new d"]:
    """Resizes the grid of a position embedding with PyTorch's bicubic interpolation, in float32.

    The released models were fine-tuned from positions resized without antialiasing; timm antialiases.

    Args:
      pos_embed: positions of prefix tokens, then of the patches in row-major order.
      old_grid: rows and columns of patches.
      new_grid: rows and columns of patches.
      antialias: as `torch.nn.functional.interpolate(..., antialias=True)`, which also has another kernel
        (a = -0.5 instead of -0.75).
      num_prefix_tokens: positions in front that belong to no patch and stay as they are.

    Raises:
      UserError: `pos_embed` has another number of positions than `old_grid` and the prefix together.
    """
    positions = np.asarray(pos_embed)
    count = positions.shape[1]
    rows, columns = old_grid
    if count != num_prefix_tokens + rows * columns:
        raise UserError(
            f"a position embedding of {count} positions is not one of {rows} by {columns} patches and "
            f"{num_prefix_tokens} prefix tokens: give the grid it was made for"
        )
    if old_grid == new_grid:
        return positions
    prefix, grid = np.split(positions, [num_prefix_tokens], axis=1)
    resized = interpolate_positions(
        jnp.asarray(grid, jnp.float32), old_grid, new_grid, antialias=antialias
    )
    return np.concatenate([prefix, np.asarray(resized).astype(positions.dtype)], axis=1)


def interpolate_positions(
    pos_embed: Float[Array, "1 old d"],
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    *,
    antialias: bool = False,
) -> Float[Array, "1 new d"]:
    """`resize_pos_embed` as a differentiable function; positions before the last `old_grid` ones are a prefix."""
    (rows, columns), width = old_grid, pos_embed.shape[-1]
    prefix, grid = jnp.split(pos_embed, [pos_embed.shape[1] - rows * columns], axis=1)
    resized = jax.image.resize(
        grid.reshape(rows, columns, width),
        (*new_grid, width),
        "cubic" if antialias else "cubic-pytorch",
        antialias=antialias,
        precision="highest",
    )
    return jnp.concatenate([prefix, resized.reshape(1, -1, width)], axis=1)


def resize_patch_embed(
    kernel: Float[np.ndarray | Array, "old old c d"], new_patch: int
) -> Float[np.ndarray, "new new c d"]:
    """Resizes a patch kernel so that a resized patch gives the same token.

    Beyer et al., "FlexiViT", arXiv 2212.08013, section 3.4: with `B` the linear map that resizes a patch
    (bicubic, antialiased), the new kernel is the pseudo-inverse of `B`'s transpose times the old one. For
    larger patches `<new, B x> = <old, x>` holds for every patch `x`, for smaller ones in the least-squares sense.
    """
    array = np.asarray(kernel)
    old = array.shape[0]
    if old == new_patch:
        return array
    one_side = jax.image.resize(
        jnp.eye(old), (new_patch, old), "cubic", antialias=True, precision="highest"
    )
    inverse = np.linalg.pinv(np.asarray(one_side, np.float64))
    # The map is the same along both sides, so its pseudo-inverse is that of one side, applied twice.
    resized: np.ndarray = np.einsum("in,jm,ijcd->nmcd", inverse, inverse, array.astype(np.float64))
    return resized.astype(array.dtype)


def adapt_input(
    weights: Mapping[str, np.ndarray],
    model: Any,
    *,
    image_size: tuple[int, int] | None = None,
    antialias: bool = False,
) -> dict[str, np.ndarray]:
    """Resizes position embedding and patch kernel where the model's images or patches have another size.

    Args:
      weights: a state dict of timm's.
      model: one without position embedding takes images of any size.
      image_size: (height, width) in pixels that the weights are for; a square image if not given.
      antialias: see `resize_pos_embed`.

    Raises:
      UserError: the weights' grid is not square and `image_size` is not given, or does not match it.
    """
    fitted = dict(weights)
    if _POSITIONS not in weights or _KERNEL not in weights:
        return fitted
    shapes = abstract_variables(model)["params"]
    positions, kernel = np.asarray(weights[_POSITIONS]), np.asarray(weights[_KERNEL])
    if _POSITIONS not in shapes or positions.ndim != 3 or kernel.ndim != 4:
        return fitted
    height, width = model.image_size
    grid = (height // model.patch_size, width // model.patch_size)
    prefix = shapes[_POSITIONS].shape[1] - grid[0] * grid[1]
    old_grid = _grid(positions.shape[1] - prefix, grid, kernel.shape[-1], image_size)
    if positions.shape[-1] != shapes[_POSITIONS].shape[-1]:
        return fitted  # of another network, which `from_timm` refuses
    fitted[_POSITIONS] = resize_pos_embed(
        positions, old_grid, grid, antialias=antialias, num_prefix_tokens=prefix
    )
    resized = resize_patch_embed(kernel.transpose(2, 3, 1, 0), model.patch_size)
    fitted[_KERNEL] = np.ascontiguousarray(resized.transpose(3, 2, 0, 1))
    return fitted


def _grid(
    count: int, wanted: tuple[int, int], patch: int, image_size: tuple[int, int] | None
) -> tuple[int, int]:
    """Rows and columns of the weights' `count` patches."""
    if image_size is not None:
        grid = (image_size[0] // patch, image_size[1] // patch)
        if grid[0] * grid[1] != count:
            raise UserError(
                f"these weights have positions for {count} patches of {patch} by {patch} pixels, not "
                f"for {image_size[0]} by {image_size[1]} pixels: {_made_for()}"
            )
        return grid
    side = math.isqrt(max(count, 0))
    square = side * side == count
    if count == wanted[0] * wanted[1] and (not square or wanted[0] == wanted[1]):
        return wanted
    if not square or count == wanted[0] * wanted[1]:
        raise UserError(
            f"these weights have positions for {count} patches, which could be cut from more than one "
            f"shape of image: {_made_for()}"
        )
    return side, side


def _made_for() -> str:
    return advise(
        Way(
            "give {}, the size they were made for",
            "weights_image_size",
            Literal("(height, width)"),
        ),
        otherwise="choose weights made for square images",
    )


_log = logging.getLogger(__name__)

# `head`, and `head_dist` of a distilled DeiT.
_HEAD = "head"


def adapt_head(
    weights: Mapping[str, np.ndarray], model: Any, *, reset: bool = False, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Drops the head where the model has 0 classes, and initialises it with `reset`, which is logged.

    Args:
      weights: a state dict of timm's.
      model: the model that the weights are for.
      reset: initialise the head.
      seed: of that initialisation.

    Returns:
      The weights, and the names of the initialised ones.

    Raises:
      UserError: the head of the weights has another number of classes, or is missing, and `reset` is False.
    """
    if model.num_classes == 0:
        body = {name: array for name, array in weights.items() if not _of_head(name)}
        return body, []

    def head(key: Any) -> dict[str, Any]:
        images = jnp.zeros((1, *model.image_size, model.in_channels))
        params = model.init(key, images)["params"]
        return {name: leaves for name, leaves in params.items() if name.startswith(_HEAD)}

    if reset:
        # Jitted: XLA drops the initialisation of everything else.
        fresh = to_timm({"params": jax.jit(head)(jax.random.key(seed))})
        _log.warning("initialised from seed %d: %s", seed, ", ".join(sorted(fresh)))
        return {**weights, **fresh}, sorted(fresh)

    shapes = jax.eval_shape(lambda: head(jax.random.key(0)))
    empty = jax.tree.map(lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), shapes)
    if not any(_of_head(name) for name in weights):
        if not weights.keys() <= timm_names(model):
            return dict(weights), []  # another network's, which `from_timm` refuses
        raise UserError(
            f"these weights have no head, and the model has {model.num_classes} classes: "
            + advise(
                Way("give {} to initialise one", "reset_head", True),
                Way("{} for features", "num_classes", 0),
                otherwise="choose weights with a head",
            )
        )
    for name, array in to_timm({"params": empty}).items():
        found = np.shape(weights.get(name, array))
        if found[:1] != array.shape[:1]:
            raise UserError(
                f"these weights have {found[0]} classes and the model {model.num_classes}: "
                + advise(
                    Way("give {} to initialise the head", "reset_head", True),
                    Way("{} to keep it", "num_classes", found[0]),
                    otherwise=f"choose weights of {model.num_classes} classes",
                )
            )
    return dict(weights), []


def _of_head(name: str) -> bool:
    return name.split(".", 1)[0] in (_HEAD, f"{_HEAD}_dist")


def mean_params(trees: Iterable[Any]) -> Any:
    """The mean of parameter trees, such as of a run's last checkpoints or of several runs.

    Over fine-tunings of one start this is the uniform soup of Wortsman et al., arXiv 2203.05482, section 2.
    Sums are float64, whatever the parameters are.

    Args:
      trees: parameter trees of one model; an iterator is read one tree at a time.

    Returns:
      The mean, a tree of numpy arrays of the parameters' own dtypes.

    Raises:
      UserError: for no tree, or for one whose names, shapes or dtypes differ from the first's.
    """
    sums: Any = None
    like: Any = None
    count = 0
    for count, tree in enumerate(trees, start=1):
        if sums is None:
            like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
            sums = jax.tree.map(lambda leaf: np.zeros(leaf.shape), like)
        else:
            _check_alike(tree, like, count)
        sums = jax.tree.map(lambda total, leaf: total + np.asarray(leaf, np.float64), sums, tree)
    if not count:
        raise UserError("there is nothing to average: give at least one tree of parameters")
    return jax.tree.map(lambda total, kind: (total / count).astype(kind.dtype), sums, like)


def _check_alike(tree: Any, like: Any, number: int) -> None:
    found, wanted = leaf_shapes(tree), leaf_shapes(like)
    for path in sorted(found.keys() ^ wanted.keys()):
        where = "it alone has" if path in found else "it lacks"
        raise UserError(
            f"tree {number} cannot be averaged with the first, for {where} {path}: give parameters of "
            "one model, all stacked or all unrolled"
        )
    for path, leaf in found.items():
        if leaf != wanted[path]:
            raise UserError(
                f"tree {number} cannot be averaged with the first, for {path} is {leaf} and was "
                f"{wanted[path]}: give parameters of one model"
            )
