"""A random function of every image of a batch, with a key by the image's position in the global batch."""

from collections.abc import Callable

import jax
from jaxtyping import Array, Int, PRNGKeyArray, Real

Images = Real[Array, "batch height width channels"]


def for_each_example(
    function: Callable[[PRNGKeyArray, Array], Array],
    key: PRNGKeyArray,
    images: Images,
    example_ids: Int[Array, "batch"],
) -> Images:
    """Applies `function` to each image with the key folded from its position.

    A CPU takes one image after the other, so that of a `lax.switch` or `lax.cond` in `function` it computes the
    chosen branch alone. Other devices take the whole batch at once, and every branch.

    Args:
      function: of a key and one image (height, width, channels), giving an image like it.
      key: the key of the step and purpose.
      images: the batch.
      example_ids: position of each image in the global batch.

    Returns:
      The results, of the shape and dtype of `images`.
    """

    def one(example: tuple[Array, Array]) -> Array:
        example_id, image = example
        return function(jax.random.fold_in(key, example_id), image)

    def in_turn(ids: Array, batch: Array) -> Array:
        return jax.lax.map(one, (ids, batch))

    def at_once(ids: Array, batch: Array) -> Array:
        return jax.vmap(one)((ids, batch))

    return jax.lax.platform_dependent(example_ids, images, cpu=in_turn, default=at_once)
