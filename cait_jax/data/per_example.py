"""A random function of every image of a batch, with a key by the image's position in the global batch."""

import functools
from collections.abc import Callable

import jax
from jaxtyping import Array, Int, PRNGKeyArray, Real

from cait_jax.sharding import shard_over_batch

ON_CHIP = 8  # images of 224 pixels, each with some ten float32 arrays, beside a TPU's cores

Images = Real[Array, "batch height width channels"]


def for_each_example(
    function: Callable[[PRNGKeyArray, Array], Array],
    key: PRNGKeyArray,
    images: Images,
    example_ids: Int[Array, "batch"],
) -> Images:
    """Applies `function` to each image with the key folded from its position.

    A CPU takes one image after the other, so that of a `lax.switch` or `lax.cond` in `function` it computes the
    chosen branch alone. A TPU takes a few, with every branch, so that what lies between is not written to its main
    memory; other devices the whole batch at once. On a mesh each device has its own images.

    Args:
      function: of a key and one image (height, width, channels), giving an image like it.
      key: the key of the step and purpose.
      images: the batch.
      example_ids: position of each image in the global batch.

    Returns:
      The results, of the shape and dtype of `images`.
    """

    def one(key: PRNGKeyArray, example: tuple[Array, Array]) -> Array:
        example_id, image = example
        return function(jax.random.fold_in(key, example_id), image)

    def some_at_a_time(size: int | None) -> Callable[..., Array]:
        def apply(ids: Array, batch: Array, key: PRNGKeyArray) -> Array:
            return jax.lax.map(functools.partial(one, key), (ids, batch), batch_size=size)

        return apply

    def at_once(ids: Array, batch: Array, key: PRNGKeyArray) -> Array:
        return jax.vmap(functools.partial(one, key))((ids, batch))

    def by_platform(*arguments: Array) -> Array:
        return jax.lax.platform_dependent(
            *arguments,
            cpu=some_at_a_time(None),
            tpu=some_at_a_time(ON_CHIP),
            default=at_once,
        )

    return shard_over_batch(by_platform, 2)(example_ids, images, key)
