"""CaiT: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239.

Patches attend to each other in `depth` self-attention blocks, with no class token among them. Then a class
token reads them in `class_depth` class-attention blocks. Every residual branch is scaled by LayerScale, which
is what lets the network be this deep. The paper's other residual schemes are in `residual.py`; `kernels/`
computes the attention below in fewer passes over memory.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from cait_jax import kernels
from cait_jax.models.layers import (
    LINEAR_INIT,
    SAVE_MATMULS,
    Activation,
    Dropout,
    DropPathScale,
    DtypePolicy,
    ExampleIds,
    HeadMixing,
    Images,
    LayerNorm,
    LayerScale,
    PatchEmbed,
    StochasticDepth,
    Tokens,
    check_images,
    gelu,
    linear,
    mix_heads,
    record,
    saveable,
    take_tokens,
)
from cait_jax.models.residual import complete_options, residual_scheme
from cait_jax.sharding import positions, reshape, tile

ClassToken = Float[Array, "batch 1 d"]

OPTIONS = ("residual", "block_norm", "class_token", "distilled", "drop_path_growth")
RATES = ("drop_path_rate", "embedding_dropout", "attention_dropout", "projection_dropout", "dropout")  # fmt: skip
REMATS = ("none", "elementwise", "attention", "block")


class SelfAttention(nn.Module):
    """Self-attention whose heads are mixed before (`proj_l`) and after (`proj_w`) the softmax."""

    num_heads: int
    talking_heads: bool = True
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    implementation: str | None = None
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        batch, tokens, width = x.shape
        heads, head_dim = self.num_heads, width // self.num_heads
        dtypes, precision, scale = self.dtypes, self.dtypes.precision, head_dim**-0.5

        # Split before the heads are: on TPUs an array with a last axis of head_dim 48 is padded to 128.
        q, k, v = jnp.split(linear(x, 3 * width, "qkv", dtypes), 3, axis=-1)
        q, k, v = (reshape(part, batch, tokens, heads, head_dim) for part in (q, k, v))
        if self.talking_heads:
            weight, bias = HeadMixing(heads, dtypes.param_dtype, name="proj_l").weights()
            pre = weight * scale, bias  # a few numbers are scaled instead of every query
            post = HeadMixing(heads, dtypes.param_dtype, name="proj_w").weights()
        else:
            q = q * scale

        implementation = self._implementation(tokens, dropped=example_ids is not None)
        if implementation == "xla":
            maps = jnp.einsum("bqhc,bkhc->bhqk", q, k, **dtypes.accumulate)
            record(self, "logits", maps * scale if self.talking_heads else maps)
            if self.talking_heads:
                maps = record(self, "mixed_logits", mix_heads(maps, *pre, precision))
            maps = record(self, "softmax", nn.softmax(maps, axis=-1))
            if self.talking_heads:
                maps = record(self, "mixed_softmax", mix_heads(maps, *post, precision))
            maps = Dropout(self.attention_dropout, name="attn_drop")(maps, example_ids)
            x = jnp.einsum("bhqk,bkhc->bqhc", maps.astype(v.dtype), v, precision=precision)
        else:
            x = kernels.talking_heads_attention(
                q, k, v, *pre, *post, implementation=implementation, precision=precision
            )

        x = linear(reshape(saveable(x), batch, tokens, width), width, "proj", dtypes)
        return Dropout(self.projection_dropout, name="proj_drop")(x, example_ids)

    def _implementation(self, tokens: int, *, dropped: bool) -> str:
        """The implementation chosen; `"xla"` where maps are small, or recorded, dropped or not mixed."""
        recorded = self.is_initializing() or self.is_mutable_collection("intermediates")
        if recorded or not self.talking_heads or (dropped and self.attention_dropout):
            return "xla"
        chosen = self.implementation or kernels.DEFAULT_ATTENTION.get(jax.default_backend(), "xla")
        small = self.num_heads * tokens**2 <= kernels.SMALL_MAPS
        return "xla" if chosen == "xla_by_image" and small else chosen


class ClassAttention(nn.Module):
    """Attention of the class token, the first of `u`, to itself and the patches (paper, equations 5 to 7)."""

    num_heads: int
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, u: Float[Array, "batch all_tokens d"]) -> ClassToken:
        batch, tokens, width = u.shape
        heads, head_dim, dtypes = self.num_heads, width // self.num_heads, self.dtypes

        q = reshape(linear(u[:, :1], width, "q", dtypes), batch, 1, heads, head_dim)
        k = reshape(linear(u, width, "k", dtypes), batch, tokens, heads, head_dim)
        v = reshape(linear(u, width, "v", dtypes), batch, tokens, heads, head_dim)

        logits = jnp.einsum("bqhc,bkhc->bhqk", q * head_dim**-0.5, k, **dtypes.accumulate)
        record(self, "logits", logits)
        maps = record(self, "softmax", nn.softmax(logits, axis=-1))
        x = jnp.einsum("bhqk,bkhc->bqhc", maps.astype(v.dtype), v, precision=dtypes.precision)
        return linear(reshape(x, batch, 1, width), width, "proj", dtypes)


class Mlp(nn.Module):
    """Two linear layers with an exact GELU, or another `activation`, between them.

    GELU is rematerialised in the backward pass: JAX's derivative of it keeps four arrays of the hidden width.
    """

    hidden: int
    dropout: float = 0.0
    dtypes: DtypePolicy = DtypePolicy()
    activation: Activation = gelu

    @functools.partial(nn.remat, policy=SAVE_MATMULS)
    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        width = x.shape[-1]
        x = self.activation(linear(x, self.hidden, "fc1", self.dtypes))
        x = Dropout(self.dropout, name="drop1")(x, example_ids)
        x = linear(x, width, "fc2", self.dtypes)
        return Dropout(self.dropout, name="drop2")(x, example_ids)


class SelfAttentionBlock(nn.Module):
    """One block of the first stage (paper, equation 4): the tokens attend to each other."""

    attention: Callable[..., nn.Module]  # SelfAttention with its attributes; `nn.remat` of it
    mlp_ratio: float
    drop_path_rate: float = 0.0
    dropout: float = 0.0
    layer_scale_init: float = 1e-5
    dtypes: DtypePolicy = DtypePolicy()
    activation: Activation = gelu  # of the MLP

    @nn.compact
    def __call__(
        self, x: Tokens, example_ids: ExampleIds = None, drop_path_scale: DropPathScale = 1.0
    ) -> Tokens:
        hidden, dtypes = int(self.mlp_ratio * x.shape[-1]), self.dtypes
        drop_path = functools.partial(StochasticDepth, self.drop_path_rate)

        y = LayerNorm(name="norm1", **dtypes.norm)(x)
        y = self.attention(name="attn")(y, example_ids)
        y = LayerScale(self.layer_scale_init, dtypes, name="layer_scale_1")(y)
        x = x + drop_path(name="drop_path_1")(y, example_ids, drop_path_scale)

        y = LayerNorm(name="norm2", **dtypes.norm)(x)
        y = Mlp(hidden, self.dropout, dtypes, self.activation, name="mlp")(y, example_ids)
        y = LayerScale(self.layer_scale_init, dtypes, name="layer_scale_2")(y)
        x = x + drop_path(name="drop_path_2")(y, example_ids, drop_path_scale)

        record(self, "features", x)
        return x


class ClassAttentionBlock(nn.Module):
    """One block of the second stage (paper, section 3): the class token reads the patches.

    The patches do not change here. No dropout, no stochastic depth; no MLP if `mlp_ratio` is 0.
    """

    num_heads: int
    mlp_ratio: float
    layer_scale_init: float = 1e-5
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, cls: ClassToken, patches: Tokens) -> ClassToken:
        hidden, dtypes = int(self.mlp_ratio * cls.shape[-1]), self.dtypes

        u = LayerNorm(name="norm1", **dtypes.norm)(jnp.concatenate([cls, patches], axis=1))
        y = ClassAttention(self.num_heads, dtypes, name="attn")(u)
        cls = cls + LayerScale(self.layer_scale_init, dtypes, name="layer_scale_1")(y)

        if self.mlp_ratio:
            y = LayerNorm(name="norm2", **dtypes.norm)(cls)
            y = Mlp(hidden, dtypes=dtypes, name="mlp")(y)
            cls = cls + LayerScale(self.layer_scale_init, dtypes, name="layer_scale_2")(y)

        record(self, "features", cls)
        return cls


class CaiT(nn.Module):
    """The network. `create_model` sets the attributes of named models; ValueError for those that do not fit."""

    image_size: tuple[int, int]  # (height, width) in pixels, both multiples of `patch_size`
    width: int  # channels d of a token, a multiple of `num_heads`
    depth: int  # number of self-attention blocks
    num_heads: int  # of both kinds of attention
    num_classes: int = 1000  # 0: no head, which gives the features before it
    in_channels: int = 3
    patch_size: int = 16  # side in pixels
    mlp_ratio: float = 4.0  # hidden width of an MLP over `width`
    residual: str = "layerscale"  # one of `residual.SCHEMES`
    block_norm: bool = True  # whether residual branches read the normalised stream
    layer_scale_init: float = 1e-5  # of LayerScale's gammas; of `residual="scalar"`, of its scalars
    talking_heads: bool = True  # mix the heads of self-attention before and after its softmax
    # "class_attention": after the patches, in blocks of its own. "input": from the start, with a position (ViT).
    # k: from block k on, without a position. "mean": none, the head reads the mean patch.
    class_token: str | int = "class_attention"
    class_depth: int | None = None  # class-attention blocks; None: 2, or 0 without class attention
    class_mlp_ratio: float | None = None  # `mlp_ratio` of those, if it differs; 0: no MLP
    distilled: bool = False  # a second token and head beside those of "input", for a teacher (DeiT)
    drop_path_rate: float = 0.0  # of stochastic depth in the self-attention blocks
    drop_path_growth: str = "constant"  # or "linear" (DeiT): from 0 in the first to it in the last
    embedding_dropout: float = 0.0  # after the position embedding
    attention_dropout: float = 0.0  # of the attention weights
    projection_dropout: float | None = None  # after self-attention; `dropout` if not given
    dropout: float = 0.0  # in MLPs
    dtype: Any = jnp.float32  # of the computation; softmax and logits are at least float32
    param_dtype: Any = jnp.float32
    precision: Any = None  # of matmuls; "highest" for exact runs
    # What is rematerialised in the backward pass: "none"; "elementwise": in a block everything but matmuls and
    # attention as a whole; "attention"; "block": whole blocks. Norms and GELU always are.
    remat: str = "none"
    attention: str | None = None  # one of `kernels.IMPLEMENTATIONS`, which agree; None: the fastest
    stacked: bool = True  # blocks in one `nn.scan`, parameters along a leading axis; False with k

    def __post_init__(self) -> None:
        """Completes and checks the attributes."""
        if any(getattr(self, name) != getattr(CaiT, name) for name in OPTIONS):
            complete_options(self)
        if self.class_depth is None:
            self.class_depth = 2 if self.class_token == "class_attention" else 0
        check_attributes(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: Images,
        train: bool = False,
        example_ids: ExampleIds = None,
        visible: Int[Array, "batch kept"] | None = None,
    ) -> Float[Array, "batch outputs"] | Float[Array, "batch kept d"]:
        """Classifies normalised images, in logits that are at least float32.

        In training, draws from `rngs["dropout"]` and `rngs["drop_path"]` by `example_ids`, each image's position
        in the global batch (by default from 0).

        With `visible`, numbers of patches counted row by row, these alone are computed, beside a class token that
        is among them. The result is their tokens after self-attention, in the order given; class attention, last
        norm and head are neither applied nor initialised.
        """
        check_images(images, self.image_size, self.in_channels)
        if train and example_ids is None:
            example_ids = positions(images)
        example_ids = example_ids if train else None
        dtypes = DtypePolicy(self.dtype, self.param_dtype, self.precision)

        x = jnp.asarray(images, self.dtype)
        x = PatchEmbed(self.width, self.patch_size, dtypes, name="patch_embed")(x)
        tokens = [self._token(name, x, count) for name, count in self.prefix.items()]
        x = jnp.concatenate([*tokens, x], axis=1) if tokens else x
        x = x + self.position_embedding(x.shape[1]).astype(self.dtype)
        x = Dropout(self.embedding_dropout, name="pos_drop")(x, example_ids)
        if visible is not None:
            prefix = sum(self.prefix.values())
            x = jnp.concatenate([x[:, :prefix], take_tokens(x[:, prefix:], visible)], axis=1)

        with nullcontext() if self.residual == "layerscale" else residual_scheme(self):
            x = self._self_attention_stage(x, example_ids, dtypes)
            if visible is not None:
                return x[:, -visible.shape[1] :]
            if self.class_token == "class_attention":
                x = self._class_attention_stage(x, dtypes)
            norm, x = self.read(x)
            x = LayerNorm(name=norm, **dtypes.norm)(x)
            features: Array = x.mean(axis=1)
            record(self, "features", features)
            if self.num_classes == 0:
                return features.astype(dtypes.accum_dtype)
            wide = DtypePolicy(dtypes.accum_dtype, self.param_dtype, self.precision)
            if not self.distilled:
                return linear(features, self.num_classes, "head", wide)
            logits = linear(x[:, 0], self.num_classes, "head", wide)
            logits_dist = linear(x[:, 1], self.num_classes, "head_dist", wide)
        record(self, "logits_class", logits)
        record(self, "logits_distillation", logits_dist)
        return (logits + logits_dist) / 2

    @property
    def prefix(self) -> dict[str, int]:
        """Names and numbers of the tokens in front of the patches from the first block on."""
        names = ("cls_token", "dist_token")[: 1 + self.distilled]
        return dict.fromkeys(names, 1) if self.class_token == "input" else {}

    @property
    def activation(self) -> Activation:
        """Of the MLPs in self-attention blocks."""
        return gelu

    def position_embedding(self, tokens: int) -> Float[Array, "1 tokens d"]:
        """Of the tokens before the first block."""
        return self.param("pos_embed", LINEAR_INIT, (1, tokens, self.width), self.param_dtype)

    def read(self, x: Tokens) -> tuple[str, Float[Array, "batch read d"]]:
        """The name of the last norm, and the tokens that it takes; their mean are the features."""
        every = self.class_token in ("class_attention", "mean")
        return "norm", x if every else x[:, : 1 + self.distilled]

    def _self_attention_stage(
        self, x: Tokens, example_ids: ExampleIds, dtypes: DtypePolicy
    ) -> Float[Array, "batch all_tokens d"]:
        attention: Any = SelfAttention
        block: Any = SelfAttentionBlock
        # Inside a scan CSE cannot undo rematerialisation, and preventing it costs.
        remat = functools.partial(nn.remat, prevent_cse=not self.stacked)
        if self.remat == "attention":
            attention = remat(attention)
        elif self.remat != "none":
            block = remat(block, policy=SAVE_MATMULS if self.remat == "elementwise" else None)
        projection = self.dropout if self.projection_dropout is None else self.projection_dropout
        rates = self.attention_dropout, projection
        options = self.num_heads, self.talking_heads, *rates, self.attention, dtypes
        attention = functools.partial(attention, *options)
        branch = self.drop_path_rate, self.dropout, self.layer_scale_init, dtypes, self.activation
        block = functools.partial(block, attention, self.mlp_ratio, *branch)
        scales = jnp.linspace(0.0, 1.0, self.depth) if self.drop_path_growth == "linear" else None

        if self.stacked:
            scan: Any = nn.scan(
                lambda block, x, scale: (
                    block(x, example_ids, 1.0 if scale is None else scale),
                    None,
                ),
                variable_axes={"params": 0, "intermediates": 0, "perturbations": 0},
                split_rngs={"params": True, "dropout": True, "drop_path": True},
                length=self.depth,
            )
            x, _ = scan(block(name="blocks"), x, scales)
            return x
        for i in range(self.depth):
            if i == self.class_token:
                x = jnp.concatenate([self._token("cls_token", x), x], axis=1)
            x = block(name=f"blocks_{i}")(x, example_ids, 1.0 if scales is None else scales[i])
        return x

    def _class_attention_stage(self, patches: Tokens, dtypes: DtypePolicy) -> ClassToken:
        mlp_ratio = self.mlp_ratio if self.class_mlp_ratio is None else self.class_mlp_ratio
        given = self.num_heads, mlp_ratio, self.layer_scale_init, dtypes
        cls = self._token("cls_token", patches)
        for i in range(self.class_depth or 0):
            cls = ClassAttentionBlock(*given, name=f"blocks_token_only_{i}")(cls, patches)
        return cls

    def _token(self, name: str, x: Tokens, count: int = 1) -> Float[Array, "batch count d"]:
        token = self.param(name, LINEAR_INIT, (1, count, self.width), self.param_dtype)
        return tile(token.astype(self.dtype), x)


def check_attributes(model: CaiT) -> None:
    """Raises ValueError where sizes, rates or choices do not fit; its message begins with the attribute."""
    (height, width), patch, heads = model.image_size, model.patch_size, model.num_heads
    if height < 1 or width < 1 or height % patch or width % patch:
        raise ValueError(f"image_size {height}x{width} cannot be cut in patches of {patch}x{patch}")
    if heads < 1 or model.width % heads:
        raise ValueError(f"num_heads {heads} does not divide width {model.width}")
    if model.depth < 1:
        raise ValueError(f"depth {model.depth} must be at least 1")
    if model.num_classes < 0:
        raise ValueError(f"num_classes {model.num_classes} must be 0 or more; 0 gives features")
    token, class_depth = model.class_token, model.class_depth or 0
    if token == "class_attention" and class_depth < 1:
        raise ValueError(f"class_depth {class_depth} must be at least 1 with class_token {token!r}")
    for name in RATES:
        if (rate := getattr(model, name)) is not None and not 0.0 <= rate < 1.0:
            raise ValueError(f"{name} {rate} must lie in [0, 1)")
    if (remat := model.remat) not in REMATS:
        raise ValueError(f"remat {remat!r} must be one of {', '.join(REMATS)}")
    known, chosen = kernels.IMPLEMENTATIONS, model.attention
    if chosen not in (None, *known):
        raise ValueError(f"attention {chosen!r} must be one of {', '.join(known)}; None chooses")
