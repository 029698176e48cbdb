"""What comes before the first block: patches, the filters that embed them, and position embeddings."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from cait_jax.explain.attention import check_transformer, patch_grid
from cait_jax.models.cait import CaiT


def cut_patches(
    images: Shaped[Any, "batch height width channels"], patch_size: int
) -> Shaped[Any, "batch patches values"]:
    """The patches, row by row, each flattened: (row, column, channel) of its pixels, the channel fastest."""
    batch, height, width, channels = images.shape
    rows, columns = height // patch_size, width // patch_size
    cut = images.reshape(batch, rows, patch_size, columns, patch_size, channels)
    return cut.swapaxes(2, 3).reshape(batch, rows * columns, patch_size**2 * channels)


def embedding_filters(
    model: CaiT, variables: Mapping[str, Any]
) -> Float[Array, "width patch_size patch_size channels"]:
    """The patch embedding's filters: channel i of a token is a patch times filter i."""
    kernel = variables["params"]["patch_embed"]["proj"]["kernel"]
    side = check_transformer(model).patch_size
    return jnp.moveaxis(kernel.reshape(side, side, -1, model.width), -1, 0)


def principal_filters(
    filters: Float[Array, "width patch_size patch_size channels"], count: int
) -> tuple[Float[Array, "count patch_size patch_size channels"], Float[Array, "count"]]:
    """The first principal components of the filters, and each one's share of the variance."""
    flat = filters.reshape(filters.shape[0], -1)
    _, values, components = jnp.linalg.svd(
        flat - flat.mean(axis=0, keepdims=True), full_matrices=False
    )
    share = values**2 / jnp.sum(values**2)
    return components[:count].reshape(-1, *filters.shape[1:]), share[:count]


def position_similarity(
    model: CaiT, variables: Mapping[str, Any]
) -> Float[Array, "rows columns rows columns"]:
    """Cosine similarity of the position embedding of each patch with that of each other."""
    rows, columns = patch_grid(check_transformer(model))
    embedding = variables["params"]["pos_embed"][0, -rows * columns :]
    unit = embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
    similarity: Array = unit @ unit.T
    return similarity.reshape(rows, columns, rows, columns)
