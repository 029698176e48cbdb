"""The projection head of DINO: Caron et al., arXiv 2104.14294, section 3.1 and appendix C."""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import LINEAR_INIT, DtypePolicy


class ProjectionHead(nn.Module):
    """Three layers, l2 normalisation, and a last layer without bias whose columns have length 1.

    So an output is the cosine of an image's vector and the output's own. A column of `last/kernel` is a direction:
    its length is divided out (paper, appendix C; the magnitudes of its weight normalisation are fixed to 1).

    Kernels start with a variance of 1 over their inputs, which at the paper's width of 2,048 is its 0.02^2: with
    that in a narrow head, vectors are short, and its biases soon make them all the same.
    """

    hidden: int
    bottleneck: int
    outputs: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, features: Float[Array, "batch d"]) -> Float[Array, "batch outputs"]:
        """Projects features to cosines, at least float32."""
        dtypes = self.dtypes
        x = features.astype(dtypes.dtype)
        for name in ("fc1", "fc2"):
            x = nn.gelu(nn.Dense(self.hidden, name=name, **dtypes.dense)(x), approximate=False)
        x = nn.Dense(self.bottleneck, name="proj", **dtypes.dense)(x)
        x = unit(x.astype(dtypes.accum_dtype), axis=-1).astype(dtypes.dtype)
        return UnitLinear(self.outputs, dtypes, name="last")(x)


class UnitLinear(nn.Module):
    """A linear map without bias by a kernel whose columns are scaled to length 1, at least in float32."""

    features: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Float[Array, "batch d"]) -> Float[Array, "batch outputs"]:
        """Multiplies by the unit columns."""
        dtypes = self.dtypes
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", LINEAR_INIT, shape, dtypes.param_dtype)
        columns = unit(kernel.astype(dtypes.accum_dtype), axis=0).astype(dtypes.dtype)
        product: Array = jnp.einsum("bd,dk->bk", x, columns, **dtypes.accumulate)
        return product


def unit(x: Array, axis: int) -> Array:
    """`x / max(||x||, 1e-12)` along an axis."""
    squares = jnp.square(x).sum(axis, keepdims=True)
    return x * jax.lax.rsqrt(jnp.maximum(squares, jnp.asarray(1e-24, x.dtype)))
