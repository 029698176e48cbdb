"""Layers that the networks share: dtype policy, patch embedding, LayerScale and dropout by example."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from cait_jax.sharding import reshape

Images = Float[Array | np.ndarray, "batch height width channels"]
Tokens = Float[Array, "batch tokens d"]
Maps = Float[Array, "batch heads queries keys"]
# Position of each example in the global batch; None for no randomness.
ExampleIds = Int[Array, "batch"] | None
DropPathScale = float | Float[Array, ""]

# For the remat policy that saves the outputs, so named, of matmuls and of attention as a whole.
saveable: Callable[[Array], Array] = functools.partial(checkpoint_name, name="product")
SAVE_MATMULS = jax.checkpoint_policies.save_only_these_names("product")
Activation = Callable[[Array], Array]
gelu: Activation = functools.partial(nn.gelu, approximate=False)  # by erf
LINEAR_INIT = nn.initializers.normal(stddev=0.02)
# Rematerialised in the backward pass from its input: JAX's derivative of a norm keeps two more float32 arrays of
# that size. CSE stays prevented, or TPU's compiler reads the input once for every use.
LayerNorm: Any = functools.partial(nn.remat(nn.LayerNorm), epsilon=1e-6, use_fast_variance=False)


@dataclasses.dataclass(frozen=True)
class DtypePolicy:
    """Dtypes of activations and parameters, and the precision of matmuls; also as Flax's arguments."""

    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None

    @property
    def accum_dtype(self) -> Any:
        """Of attention logits, softmax and class logits: at least float32."""
        return jnp.promote_types(self.dtype, jnp.float32)

    @property
    def accumulate(self) -> dict[str, Any]:
        return {"precision": self.precision, "preferred_element_type": self.accum_dtype}

    @property
    def norm(self) -> dict[str, Any]:
        return {"dtype": self.dtype, "param_dtype": self.param_dtype}

    @property
    def dense(self) -> dict[str, Any]:
        return {**self.norm, "precision": self.precision}


def check_images(images: Any, size: tuple[int, int] | None, channels: int) -> None:
    """Refuses images that are not normalised, not in a batch, or of another layout, size or number of channels.

    Raises:
      ValueError: saying how to prepare them.
    """
    shape, ndim = images.shape, images.ndim
    expected = (*(size or ("height", "width")), channels)
    fits = f"a model for (batch, {', '.join(map(str, expected))})"
    if ndim == 3:
        raise ValueError(f"images of shape {shape} have no batch axis: give images[None] to {fits}")
    if ndim == 4 and shape[3] != channels and shape[1] == channels:
        raise ValueError(
            f"images of shape {shape} have their channels first: give jnp.moveaxis(images, 1, -1) to {fits}"
        )
    if ndim != 4 or shape[3] != channels or (size is not None and shape[1:3] != size):
        raise ValueError(
            f"images of shape {shape} do not fit {fits}: resize them, or create the model with that image_size "
            "and in_channels"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"images of {images.dtype} are not normalised: read files by cait_jax.preprocessing(MODEL)(paths), or "
            "give (images / 255 - mean) / std of the model's `cait_jax.preprocessing`"
        )


def linear(x: Array, features: int, name: str, dtypes: DtypePolicy) -> Array:
    """A linear layer that starts from N(0, 0.02^2) and 0; its output is one of `SAVE_MATMULS`."""
    layer = nn.Dense(features, kernel_init=LINEAR_INIT, name=name, **dtypes.dense)
    return saveable(layer(x))


def keep_mask(
    key: PRNGKeyArray, example_ids: Array, rate: DropPathScale, shape: tuple[int, ...]
) -> Bool[Array, "batch *shape"]:
    """Draws which entries of each example's `shape` survive dropout at `rate`.

    An example's draws depend on `key` and its id only: they are the same on any mesh and in any micro batch.
    """

    def draw(example_id: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, example_id), 1.0 - rate, shape)

    return jax.vmap(draw)(example_ids)


class Dropout(nn.Module):
    """Dropout of single entries where `example_ids` are given. Random stream: `dropout`."""

    rate: float

    @nn.compact
    def __call__(self, x: Array, example_ids: ExampleIds = None) -> Array:
        if example_ids is None or self.rate == 0.0:
            return x
        keep = keep_mask(self.make_rng("dropout"), example_ids, self.rate, x.shape[1:])
        return jnp.where(keep, x / (1.0 - self.rate), jnp.zeros_like(x))


class StochasticDepth(nn.Module):
    """Drops whole residual branches where `example_ids` are given (Huang et al., arXiv 1603.09382).

    A block's `scale`, in [0, 1], multiplies the rate. Random stream: `drop_path`.
    """

    rate: float

    @nn.compact
    def __call__(
        self, branch: Tokens, example_ids: ExampleIds = None, scale: DropPathScale = 1.0
    ) -> Tokens:
        if example_ids is None or self.rate == 0.0:
            return branch
        rate = self.rate * scale
        keep = keep_mask(self.make_rng("drop_path"), example_ids, rate, (1, 1))
        # One factor an image: a mask of the branch's shape would be kept for the backward pass.
        factor = jnp.where(keep, 1.0 / (1.0 - rate), 0.0)
        return (branch * factor).astype(branch.dtype)


class LayerScale(nn.Module):
    """Multiplies each channel of a residual branch by a learned gamma (paper, equation 4)."""

    init_value: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, branch: Tokens) -> Tokens:
        init, shape = nn.initializers.constant(self.init_value), (branch.shape[-1],)
        gamma = self.param("gamma", init, shape, self.dtypes.param_dtype)
        return branch * gamma.astype(branch.dtype)[None, None, :]


class PatchEmbed(nn.Module):
    """Maps each square patch linearly to a token, row by row; uniform start in +-1/sqrt(fan in)."""

    width: int
    patch_size: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, images: Images) -> Tokens:
        batch, height, width, channels = images.shape
        side = self.patch_size
        rows, columns, bound = height // side, width // side, (side**2 * channels) ** -0.5
        init: Any = functools.partial(jax.random.uniform, minval=-bound, maxval=bound)
        # The convolution as a matmul: windows do not overlap, and compilers unroll its gradient.
        windows = reshape(images, batch, rows, side, columns, side, channels)
        options = {"kernel_init": init, "bias_init": init, **self.dtypes.dense}
        proj = nn.DenseGeneral(self.width, (-3, -2, -1), name="proj", **options)
        return reshape(proj(jnp.swapaxes(windows, 2, 3)), batch, rows * columns, self.width)


def take_tokens(x: Tokens, numbers: Int[Array, "batch taken"]) -> Float[Array, "batch taken d"]:
    """The tokens of each image that have these numbers, in their order."""
    return jnp.take_along_axis(x, numbers[:, :, None], axis=1)


class HeadMixing(nn.Module):
    """A linear map with bias over the heads of attention maps (Shazeer et al., arXiv 2003.02436)."""

    heads: int
    param_dtype: Any = jnp.float32

    @nn.compact
    def weights(self) -> tuple[Float[Array, "heads heads"], Float[Array, "heads"]]:
        kernel = self.param("kernel", LINEAR_INIT, (self.heads, self.heads), self.param_dtype)
        return kernel, self.param("bias", nn.initializers.zeros, (self.heads,), self.param_dtype)


def mix_heads(maps: Maps, kernel: Array, bias: Array, precision: Any = None) -> Maps:
    """`out[:, g] = sum_h maps[:, h] * kernel[h, g] + bias[g]`, in the dtype of `maps`."""
    mixed = jnp.einsum("bhqk,hg->bgqk", maps, kernel.astype(maps.dtype), precision=precision)
    return mixed + bias.astype(maps.dtype)[None, :, None, None]


def record(module: nn.Module, name: str, value: Array) -> Array:
    """Sows `value` into `intermediates` where the caller made that mutable, and returns it.

    An entry of the collection `perturbations` is added first: the gradient with respect to it is that of `value`.
    """
    if module.has_variable("perturbations", name):
        value = value + module.get_variable("perturbations", name)
    module.sow("intermediates", name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)
    return value
