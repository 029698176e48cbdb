"""Residual schemes: CaiT's own (`layerscale`) and those the paper compares it with (section 2, figure 2).

| scheme | added to the stream | start |
|---|---|---|
| `layerscale` | `gamma * branch`, one gamma a channel | gamma = init_scale |
| `scalar` | `alpha * branch`, one alpha a branch | alpha = init_scale |
| `plain` | `branch` | |
| `rezero`, `skipinit` | `alpha * branch` | alpha = 0 |
| `fixup` | `alpha * branch`, scalar biases before linear layers | alpha = 1, its own weights |
| `t_fixup` | `branch` | its own weights |

The schemes after `scalar` were designed to train without normalisation; the paper adds it again (`norm=True`).
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.kernels.talking_heads import IMPLEMENTATIONS
from cait_jax.models.layers import LINEAR_INIT, DtypePolicy, Tokens

SCHEMES = ("layerscale", "scalar", "plain", "rezero", "skipinit", "fixup", "t_fixup")
ALWAYS_NORMED = ("layerscale", "scalar")  # `norm=False` is not defined for these

Initializer = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class Residual:
    """A residual scheme.

    Attributes:
      scheme: one of `SCHEMES`.
      norm: whether branches read the normalised stream.
      init_scale: start value of LayerScale's gammas and of `scalar`'s alphas.
      blocks: blocks N of the network, of two branches each.
    """

    scheme: str = "layerscale"
    norm: bool = True
    init_scale: float = 1e-5
    blocks: int = 1

    def kernel_init(self, layer: str) -> Initializer:
        """The initialiser of `qkv`, `q`, `k`, `v`, `proj`, `fc1`, `fc2` or `head`.

        fixup (Zhang et al., arXiv 1901.09321, section 3): 0 for the head and the last layer of a branch; the
        others are He et al.'s, times L^(-1/(2m-2)) with L = 2N branches of m = 2 layers on their path:
        N(0, 2 / fan_in) * (2N)^(-1/2).

        t_fixup (Huang et al., "Improving Transformer Optimization Through Better Initialization", ICML 2020,
        its rule for encoders): in branches Glorot and Bengio's U(-a, a) with a^2 = 6 / (fan_in + fan_out);
        values, projection and MLP times 0.67 N^(-1/4).

        Otherwise N(0, 0.02^2), as in the paper's code.
        """
        if self.scheme == "fixup":
            if layer in ("proj", "fc2", "head"):
                return nn.initializers.zeros
            return nn.initializers.variance_scaling(2.0 / (2 * self.blocks), "fan_in", "normal")
        if self.scheme == "t_fixup" and layer != "head":
            plain = nn.initializers.glorot_uniform()
            factor = 0.67 * self.blocks**-0.25
            scaled = nn.initializers.variance_scaling(factor**2, "fan_avg", "uniform")
            if layer == "qkv":
                return _side_by_side(plain, plain, scaled)
            return plain if layer in ("q", "k") else scaled
        return LINEAR_INIT


def scale_branch(branch: Tokens, number: int, residual: Residual, dtypes: DtypePolicy) -> Tokens:
    """What a scheme other than `layerscale` adds to the stream for a block's branch `number`, 1 or 2."""
    starts = {"scalar": residual.init_scale, "rezero": 0.0, "skipinit": 0.0, "fixup": 1.0}
    if residual.scheme not in starts:
        return branch
    return BranchScale(starts[residual.scheme], dtypes, name=f"branch_scale_{number}")(branch)


class BranchScale(nn.Module):
    """Multiplies a residual branch by one learned number (ReZero, arXiv 2003.04887; SkipInit, 2002.10444)."""

    init_value: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, branch: Tokens) -> Tokens:
        """Scales all of `branch`."""
        init = nn.initializers.constant(self.init_value)
        alpha = self.param("alpha", init, (), self.dtypes.param_dtype)
        return branch * alpha.astype(branch.dtype)


class ScalarBias(nn.Module):
    """Adds one learned number (Fixup, rule 3)."""

    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """Shifts all of `x`."""
        bias = self.param("bias", nn.initializers.zeros, (), self.dtypes.param_dtype)
        return x + bias.astype(x.dtype)


def scalar_biases(
    residual: Residual, dtypes: DtypePolicy
) -> contextlib.AbstractContextManager[Any]:
    """With `fixup`, inserts `before_NAME`, a `ScalarBias`, in front of every `nn.Dense` applied inside.

    Fixup's other scalar bias, before an activation, is part of the bias vector of the layer in front.
    """
    if residual.scheme != "fixup":
        return contextlib.nullcontext()

    def shift_input(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        module = context.module
        if isinstance(module, nn.Dense) and context.method_name == "__call__":
            bias = ScalarBias(dtypes, name=f"before_{module.name}", parent=module.parent)
            args = (bias(args[0]),)
        return call(*args, **kwargs)

    return nn.intercept_methods(shift_input)


def _side_by_side(*parts: Initializer) -> Initializer:
    """Initialises the column blocks of a matrix one by one: each as a matrix of its own."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        part = (*shape[:-1], shape[-1] // len(parts))
        keys = jax.random.split(key, len(parts))
        blocks = [make(k, part, dtype) for make, k in zip(parts, keys, strict=True)]
        return jnp.concatenate(blocks, axis=-1)

    return init


_RATES = (
    "drop_path_rate",
    "embedding_dropout",
    "attention_dropout",
    "projection_dropout",
    "dropout",
)
REMATS = ("none", "elementwise", "attention", "block")
DROP_PATH_GROWTHS = ("constant", "linear")
CLASS_TOKENS = ("class_attention", "input", "mean")


def complete_options(model: Any) -> None:
    """Sets the attributes whose default depends on others, and checks that all fit each other.

    Args:
      model: a `CaiT` that is being constructed.

    Raises:
      ValueError: naming the attribute, its value and what it must be.
    """
    if isinstance(model.class_token, str) and model.class_token.isdecimal():  # of a command line
        object.__setattr__(model, "class_token", int(model.class_token))
    if model.class_depth is None:
        depth = 2 if model.class_token == "class_attention" else 0
        object.__setattr__(model, "class_depth", depth)
    if isinstance(model.class_token, int):
        object.__setattr__(model, "stacked", False)
    _check_sizes(model)
    _check_choices(model)
    _check_class_token(model)


def check_images(model: Any, images: Any) -> None:
    """Raises ValueError if images do not have the size and channels of a `CaiT`."""
    expected = (*model.image_size, model.in_channels)
    if images.shape[1:] != expected:
        raise ValueError(
            f"images of shape {images.shape[1:]} do not fit a model for {expected} (height, width, "
            "channels): resize them, or create the model with that image_size and in_channels"
        )


def _check_sizes(model: Any) -> None:
    height, width = model.image_size
    if height < 1 or width < 1 or height % model.patch_size or width % model.patch_size:
        raise ValueError(
            f"image_size {height}x{width} cannot be cut in patches of {model.patch_size}x"
            f"{model.patch_size}: both sides must be multiples of {model.patch_size}"
        )
    if model.num_heads < 1 or model.width % model.num_heads:
        raise ValueError(
            f"num_heads {model.num_heads} does not divide width {model.width}: "
            "every head needs the same number of channels"
        )
    if model.depth < 1:
        raise ValueError(f"depth {model.depth} must be at least 1")
    if model.num_classes < 0:
        raise ValueError(f"num_classes {model.num_classes} must be 0 or more; 0 gives features")
    for name in _RATES:
        rate = getattr(model, name)
        if rate is not None and not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} {rate} must lie in [0, 1)")


def _check_choices(model: Any) -> None:
    for name, known in (
        ("remat", REMATS),
        ("residual", SCHEMES),
        ("drop_path_growth", DROP_PATH_GROWTHS),
    ):
        if getattr(model, name) not in known:
            raise ValueError(f"{name} {getattr(model, name)!r} must be one of {', '.join(known)}")
    if model.attention not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"attention {model.attention!r} must be one of {', '.join(IMPLEMENTATIONS)}; None chooses"
        )
    if not model.block_norm and model.residual in ALWAYS_NORMED:
        raise ValueError(
            f"residual {model.residual!r} keeps its norms: only "
            f"{', '.join(name for name in SCHEMES if name not in ALWAYS_NORMED)} go without block_norm"
        )


def _check_class_token(model: Any) -> None:
    token, depth = model.class_token, model.class_depth or 0
    number = isinstance(token, int) and not isinstance(token, bool)
    if token not in CLASS_TOKENS if not number else not 0 <= int(token) < model.depth:
        raise ValueError(
            f"class_token {token!r} must be one of {', '.join(CLASS_TOKENS)}, or the number of the block "
            f"before which it joins the patches, 0 to {model.depth - 1}"
        )
    if token == "class_attention" and depth < 1:
        raise ValueError(
            f"class_depth {depth} must be at least 1 with class_token 'class_attention'"
        )
    if token != "class_attention" and (depth or model.class_mlp_ratio is not None):
        raise ValueError(
            f"class_depth {depth} and class_mlp_ratio {model.class_mlp_ratio} go with class_token "
            f"'class_attention', not {token!r}: leave them out"
        )
    if model.distilled and token != "input":
        raise ValueError(f"distilled goes with class_token 'input', not {token!r}")
