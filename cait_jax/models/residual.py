"""What the paper compares CaiT with: residual schemes (section 2, figure 2) and places of the class token.

| scheme | added to the stream | start |
|---|---|---|
| `layerscale` | `gamma * branch`, one gamma a channel | gamma = layer_scale_init |
| `scalar` | `alpha * branch`, one alpha a branch | alpha = layer_scale_init |
| `plain` | `branch` | |
| `rezero`, `skipinit` | `alpha * branch` | alpha = 0 |
| `fixup` | `alpha * branch`, scalar biases before linear layers | alpha = 1, its own weights |
| `t_fixup` | `branch` | its own weights |

The schemes after `scalar` were designed to train without normalisation; the paper adds it again
(`block_norm=True`).
"""

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.models.layers import LINEAR_INIT, DtypePolicy, LayerScale, Tokens

if TYPE_CHECKING:
    from cait_jax.models.cait import CaiT

SCHEMES = ("layerscale", "scalar", "plain", "rezero", "skipinit", "fixup", "t_fixup")
ALWAYS_NORMED = ("layerscale", "scalar")  # `block_norm=False` is not defined for these
DROP_PATH_GROWTHS = ("constant", "linear")
CLASS_TOKENS = ("class_attention", "input", "mean")

Initializer = Callable[..., Any]


def residual_scheme(model: "CaiT") -> contextlib.AbstractContextManager[Any]:
    """Turns the blocks that are applied inside, made for LayerScale, into those of `model.residual`.

    Intercepts the calls of their layers: in place of `layer_scale_1` comes `branch_scale_1` or nothing; `norm1`
    and `norm2` go without `block_norm`; linear layers start as the scheme says; with `fixup` a scalar bias
    `before_NAME` comes before each. Fixup's other scalar bias, before an activation, is part of the bias vector of
    the layer in front.
    """
    scheme, blocks = model.residual, model.depth + (model.class_depth or 0)
    starts = {"scalar": model.layer_scale_init, "rezero": 0.0, "skipinit": 0.0, "fixup": 1.0}
    dtypes = DtypePolicy(model.dtype, model.param_dtype, model.precision)

    def replace(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer, name = context.module, str(context.module.name)
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        if isinstance(layer, LayerScale):
            if scheme not in starts:
                return args[0]
            name = name.replace("layer_scale", "branch_scale")
            return BranchScale(starts[scheme], dtypes, name=name, parent=layer.parent)(args[0])
        if name in ("norm1", "norm2") and not model.block_norm:
            return args[0]
        if isinstance(layer, nn.Dense) and scheme in ("fixup", "t_fixup"):
            # Read at the first call only; Flax has no public way to change a layer that is in its place.
            object.__setattr__(layer, "kernel_init", kernel_init(scheme, blocks, name))
            if scheme == "fixup" and not name.startswith("head"):
                bias = ScalarBias(dtypes, name=f"before_{name}", parent=layer.parent)
                return call(bias(args[0]), **kwargs)
        return call(*args, **kwargs)

    return nn.intercept_methods(replace)


def kernel_init(scheme: str, blocks: int, layer: str) -> Initializer:
    """The initialiser of `qkv`, `q`, `k`, `v`, `proj`, `fc1`, `fc2` or a head in a network of N = `blocks` blocks.

    `fixup` (Zhang et al., arXiv 1901.09321, section 3): 0 for heads and the last layer of a branch; the others are
    He et al.'s, times L^(-1/(2m-2)) with L = 2N branches of m = 2 layers on their path:
    N(0, 2 / fan_in) * (2N)^(-1/2).

    `t_fixup` (Huang et al., "Improving Transformer Optimization Through Better Initialization", ICML 2020, the
    rule for encoders): in branches Glorot and Bengio's U(-a, a) with a^2 = 6 / (fan_in + fan_out); values,
    projection and MLP times 0.67 N^(-1/4). Heads as in the paper's code, N(0, 0.02^2).
    """
    if scheme == "fixup":
        if layer in ("proj", "fc2") or layer.startswith("head"):
            return nn.initializers.zeros
        return nn.initializers.variance_scaling(2.0 / (2 * blocks), "fan_in", "normal")
    if layer.startswith("head"):
        return LINEAR_INIT
    plain = nn.initializers.glorot_uniform()
    factor = 0.67 * blocks**-0.25
    scaled = nn.initializers.variance_scaling(factor**2, "fan_avg", "uniform")
    if layer == "qkv":
        return _side_by_side(plain, plain, scaled)
    return plain if layer in ("q", "k") else scaled


def _side_by_side(*parts: Initializer) -> Initializer:
    """Initialises the column blocks of a matrix one by one: each as a matrix of its own."""

    def init(key: Any, shape: tuple[int, ...], dtype: Any) -> Array:
        part = (*shape[:-1], shape[-1] // len(parts))
        keys = jax.random.split(key, len(parts))
        blocks = [make(k, part, dtype) for make, k in zip(parts, keys, strict=True)]
        return jnp.concatenate(blocks, axis=-1)

    return init


class BranchScale(nn.Module):
    """Multiplies a residual branch by one learned number (ReZero, arXiv 2003.04887; SkipInit, 2002.10444)."""

    init_value: float
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, branch: Tokens) -> Tokens:
        init = nn.initializers.constant(self.init_value)
        alpha = self.param("alpha", init, (), self.dtypes.param_dtype)
        return branch * alpha.astype(branch.dtype)


class ScalarBias(nn.Module):
    """Adds one learned number (Fixup, rule 3)."""

    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        bias = self.param("bias", nn.initializers.zeros, (), self.dtypes.param_dtype)
        return x + bias.astype(x.dtype)


def complete_options(model: "CaiT") -> None:
    """Completes and checks the attributes in which a `CaiT` under construction differs from the paper's network.

    Raises:
      ValueError: naming the attribute, its value and what it must be.
    """
    if isinstance(model.class_token, str) and model.class_token.isdecimal():  # of a command line
        model.class_token = int(model.class_token)
    if isinstance(model.class_token, int):
        model.stacked = False
    for name, known in (("residual", SCHEMES), ("drop_path_growth", DROP_PATH_GROWTHS)):
        if getattr(model, name) not in known:
            raise ValueError(f"{name} {getattr(model, name)!r} must be one of {', '.join(known)}")
    if not model.block_norm and model.residual in ALWAYS_NORMED:
        raise ValueError(
            f"residual {model.residual!r} keeps its norms: only "
            f"{', '.join(name for name in SCHEMES if name not in ALWAYS_NORMED)} go without block_norm"
        )
    token, depth = model.class_token, model.class_depth or 0
    number = isinstance(token, int) and not isinstance(token, bool)
    if token not in CLASS_TOKENS if not number else not 0 <= int(token) < model.depth:
        raise ValueError(
            f"class_token {token!r} must be one of {', '.join(CLASS_TOKENS)}, or the number of the block "
            f"before which it joins the patches, 0 to {model.depth - 1}"
        )
    if token != "class_attention" and (depth or model.class_mlp_ratio is not None):
        raise ValueError(
            f"class_depth {depth} and class_mlp_ratio {model.class_mlp_ratio} go with class_token "
            f"'class_attention', not {token!r}: leave them out"
        )
    if model.distilled and token != "input":
        raise ValueError(f"distilled goes with class_token 'input', not {token!r}")
