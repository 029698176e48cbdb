"""The pieces every block is made of: patch embedding, LayerScale, dropout, stochastic depth."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, UInt

Images = Float[Array | np.ndarray, "batch height width channels"]
Tokens = Float[Array, "batch tokens d"]
# Where each example stands in the global batch. Modules take None for "no randomness".
ExampleIds = Int[Array, "batch"] | None
Share = float | Float[Array, ""]

# Marks what a matrix product gave, for `remat="elementwise"`.
PRODUCT = "product"
LINEAR_INIT = nn.initializers.normal(stddev=0.02)
# Going back it is computed anew from what went in, fetched once: its own derivative keeps two float32 arrays as
# large. (Common subexpressions are left apart, or TPU's compiler fetches the input for each use.)
LayerNorm: Any = nn.remat(nn.LayerNorm)


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Number formats of a network.

    Attributes:
      dtype: what activations are computed in.
      param_dtype: what parameters are stored in.
      precision: how exactly matrices are multiplied; `"highest"` for parity runs.
    """

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None

    @property
    def wide(self) -> Any:
        """The dtype of attention logits, softmax and class logits: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    def dense(self, features: int, name: str, kernel_init: Any = LINEAR_INIT) -> nn.Dense:
        """A linear layer with bias, initialised as the paper's code does if not said otherwise."""
        return nn.Dense(
            features,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            precision=self.precision,
            kernel_init=kernel_init,
            name=name,
        )

    def norm(self, name: str) -> nn.LayerNorm:
        """A LayerNorm with the epsilon of every network here."""
        return LayerNorm(
            epsilon=1e-6,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            use_fast_variance=False,
            name=name,
        )


def keep_mask(
    key: PRNGKeyArray | UInt[Array, "2"],
    example_ids: Int[Array, "batch"],
    rate: Share,
    shape: tuple[int, ...],
) -> Bool[Array, "batch *shape"]:
    """Draws which entries survive dropout, each example from a key of its own.

    The draws of an example depend on `key` and its id only, not on the examples beside it, so they are the
    same on any number of devices and in any micro batch.

    Args:
      key: the key of this layer and step.
      example_ids: position of each example in the global batch.
      rate: probability of dropping an entry.
      shape: shape of one example's mask.

    Returns:
      True where an entry is kept.
    """

    def draw(example_id: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, example_id), 1.0 - rate, shape)

    return jax.vmap(draw)(example_ids)


class Dropout(nn.Module):
    """Dropout of single entries; survivors are scaled by `1 / (1 - rate)`. Random stream: `dropout`."""

    rate: float

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch *rest"], example_ids: ExampleIds = None
    ) -> Float[Array, "batch *rest"]:
        """Drops entries of `x` when `example_ids` are given, and returns `x` itself otherwise."""
        if example_ids is None or self.rate == 0.0:
            return x
        keep = keep_mask(self.make_rng("dropout"), example_ids, self.rate, x.shape[1:])
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class StochasticDepth(nn.Module):
    """Drops a whole residual branch of an example (Huang et al., arXiv 1603.09382).

    Survivors are scaled by `1 / (1 - rate)`. Random stream: `drop_path`.
    """

    rate: float

    @nn.compact
    def __call__(
        self, branch: Tokens, example_ids: ExampleIds = None, share: Share = 1.0
    ) -> Tokens:
        """Drops branches when `example_ids` are given, and returns `branch` itself otherwise.

        Args:
          branch: the branch.
          example_ids: position of each example in the global batch.
          share: what part of the rate applies here, from 0 to 1, where it grows with depth.
        """
        if example_ids is None or self.rate == 0.0:
            return branch
        rate = self.rate * share
        keep = keep_mask(self.make_rng("drop_path"), example_ids, rate, (1, 1))
        # One factor an image: a mask of the branch's shape would be kept for the backward pass.
        factor = jnp.where(keep, 1.0 / (1.0 - rate), 0.0)
        return (branch * factor).astype(branch.dtype)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned gamma (paper, equation 4).

    Attributes:
      init_value: start value of every gamma; small for deep networks.
    """

    init_value: float
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, branch: Tokens) -> Tokens:
        """Scales the last axis of `branch`."""
        gamma = self.param(
            "gamma",
            nn.initializers.constant(self.init_value),
            (branch.shape[-1],),
            self.numerics.param_dtype,
        )
        return branch * gamma.astype(branch.dtype)[None, None, :]


def _uniform_fan_in(key: Any, shape: tuple[int, ...], dtype: Any, *, fan_in: int) -> Array:
    bound = fan_in**-0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class PatchEmbed(nn.Module):
    """Cuts an image in square patches and maps each linearly to a token, row by row.

    Weight and bias start uniform in +-1/sqrt(fan in), as the published code's convolution does.
    """

    width: int
    patch_size: int
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        """Maps (batch, height, width, channels) to (batch, height / patch * width / patch, width)."""
        batch, height, width, channels = images.shape
        side, fan_in = self.patch_size, self.patch_size**2 * channels

        def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
            return _uniform_fan_in(key, shape, dtype, fan_in=fan_in)

        # The convolution as a product: windows do not overlap, and compilers unroll its gradient.
        windows = images.reshape(batch, height // side, side, width // side, side, channels)
        patches = nn.DenseGeneral(
            self.width,
            axis=(-3, -2, -1),
            dtype=self.numerics.dtype,
            param_dtype=self.numerics.param_dtype,
            precision=self.numerics.precision,
            kernel_init=init,
            bias_init=init,
            name="proj",
        )(jnp.swapaxes(windows, 2, 3))
        return patches.reshape(images.shape[0], -1, self.width)


def record(module: nn.Module, name: str, value: Array) -> None:
    """Leaves `value` in the `intermediates` collection, where a caller asked for that; free otherwise."""
    module.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
