"""How a residual branch starts and is added: the schemes that the paper compares (section 2, figure 2).

| scheme | added to the stream | start |
|---|---|---|
| `layerscale` | `gamma * branch`, one gamma a channel | gamma = epsilon (the paper's own) |
| `scalar` | `alpha * branch`, one alpha a branch | alpha = epsilon |
| `plain` | `branch` | |
| `rezero`, `skipinit` | `alpha * branch` | alpha = 0 |
| `fixup` | `alpha * branch`, scalar biases before linear layers | alpha = 1, its own weights |
| `t_fixup` | `branch` | its own weights |

The schemes after `scalar` were made to do without normalisation; the paper puts it back (`norm=True`).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from cait_jax.models.layers import LINEAR_INIT, PRODUCT, LayerScale, Numerics, Tokens

SCHEMES = ("layerscale", "scalar", "plain", "rezero", "skipinit", "fixup", "t_fixup")
# With these, normalisation belongs to the scheme.
ALWAYS_NORMED = ("layerscale", "scalar")

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Residual:
    """Makes the linear layers, the norm and the scale of every residual branch of a network.

    Attributes:
      scheme: one of `SCHEMES`.
      norm: whether branches read the normalised stream.
      epsilon: start value of LayerScale's gammas and of `scalar`'s alphas.
      blocks: blocks N of the network, of two branches each.
      numerics: number formats.
    """

    scheme: str = "layerscale"
    norm: bool = True
    epsilon: float = 1e-5
    blocks: int = 1
    numerics: Numerics = Numerics()  # noqa: RUF009

    def linear(
        self, x: Float[Array, "... n_in"], features: int, name: str
    ) -> Float[Array, "... n_out"]:
        """A linear layer inside a branch: one of `qkv`, `q`, `k`, `v`, `proj`, `fc1`, `fc2`."""
        if self.scheme == "fixup":
            x = ScalarBias(self.numerics, name=f"before_{name}")(x)
        return checkpoint_name(
            self.numerics.dense(features, name, self.kernel_init(name))(x), PRODUCT
        )

    def normed(self, x: Tokens, name: str) -> Tokens:
        """What a branch reads: the stream `x`, through LayerNorm unless the network has none."""
        return self.numerics.norm(name)(x) if self.norm else x

    def scaled(self, branch: Tokens, number: int) -> Tokens:
        """What is added to the stream for the block's branch `number`, 1 or 2."""
        if self.scheme == "layerscale":
            return LayerScale(self.epsilon, self.numerics, name=f"layer_scale_{number}")(branch)
        starts = {
            "scalar": self.epsilon, "rezero": 0.0, "skipinit": 0.0, "fixup": 1.0
        }  # fmt: skip
        if self.scheme in starts:
            scale = BranchScale(starts[self.scheme], self.numerics, name=f"branch_scale_{number}")
            return scale(branch)
        return branch

    def kernel_init(self, layer: str) -> Initializer:
        """The start of a branch's weight matrix.

        fixup (Zhang et al., arXiv 1901.09321, section 3): the last layer of a branch is 0; the others
        are He et al.'s, times L^(-1/(2m-2)) with L = 2N branches of m = 2 layers on their path:
        N(0, 2 / fan_in) * (2N)^(-1/2).

        t_fixup (Huang et al., "Improving Transformer Optimization Through Better Initialization", ICML 2020,
        its rule for encoders): Glorot and Bengio's
        U(-a, a) with a^2 = 6 / (fan_in + fan_out); values, projection and MLP times 0.67 N^(-1/4).

        Otherwise N(0, 0.02^2), as in the paper's code.
        """
        if self.scheme == "fixup":
            if layer in ("proj", "fc2"):
                return nn.initializers.zeros
            return nn.initializers.variance_scaling(2.0 / (2 * self.blocks), "fan_in", "normal")
        if self.scheme == "t_fixup":
            plain = nn.initializers.glorot_uniform()
            factor = 0.67 * self.blocks**-0.25
            scaled = nn.initializers.variance_scaling(factor**2, "fan_avg", "uniform")
            if layer == "qkv":
                return _side_by_side(plain, plain, scaled)
            return plain if layer in ("q", "k") else scaled
        return LINEAR_INIT

    @property
    def head_init(self) -> Initializer:
        """The start of the classifier's weights; Fixup has it 0 (its rule 1)."""
        return nn.initializers.zeros if self.scheme == "fixup" else LINEAR_INIT


class BranchScale(nn.Module):
    """Multiplies a residual branch by one learned number (ReZero, arXiv 2003.04887; SkipInit, 2002.10444)."""

    init_value: float
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, branch: Tokens) -> Tokens:
        """Scales all of `branch`."""
        alpha = self.param(
            "alpha", nn.initializers.constant(self.init_value), (), self.numerics.param_dtype
        )
        return branch * alpha.astype(branch.dtype)


class ScalarBias(nn.Module):
    """Adds one learned number before a linear layer (Fixup, rule 3).

    The rule's other bias, before an activation, is part of the bias vector of the layer in front.
    """

    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Shifts all of `x`."""
        bias = self.param("bias", nn.initializers.zeros, (), self.numerics.param_dtype)
        return x + bias.astype(x.dtype)


def _side_by_side(*parts: Initializer) -> Initializer:
    """Initialises the column blocks of a matrix one by one: each as a matrix of its own."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        part = (*shape[:-1], shape[-1] // len(parts))
        keys = jax.random.split(key, len(parts))
        blocks = [make(k, part, dtype) for make, k in zip(parts, keys, strict=True)]
        return jnp.concatenate(blocks, axis=-1)

    return init
