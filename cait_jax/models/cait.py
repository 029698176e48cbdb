"""CaiT: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239.

Patches attend to each other in `depth` self-attention blocks, with no class token among them. Then the
patches are frozen, and a class token reads them in `class_depth` class-attention blocks. Every residual
branch is scaled by LayerScale, which is what lets the network be this deep.

What the paper compares CaiT with is an option; the other residual schemes are in `residual.py`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float

from cait_jax.kernels import talking_heads as kernels
from cait_jax.models.layers import (
    LINEAR_INIT,
    SAVE_MATMULS,
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
    record,
    saveable,
    scan_blocks,
)
from cait_jax.models.residual import (
    Residual,
    check_images,
    complete_options,
    scalar_biases,
    scale_branch,
)

ClassToken = Float[Array, "batch 1 d"]


class SelfAttention(nn.Module):
    """Self-attention whose heads are mixed before (`proj_l`) and after (`proj_w`) the softmax.

    Records `logits`, `mixed_logits`, `softmax` and `mixed_softmax`, each (batch, heads, queries, keys);
    without talking heads, `logits` and `softmax`. Where maps are dropped, recorded or not mixed they are
    computed step by step, otherwise by `implementation` of `kernels.talking_heads_attention`.
    """

    num_heads: int
    talking_heads: bool = True
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    implementation: str | None = None
    residual: Residual = Residual()
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Attends from every token to every token."""
        batch, tokens, width = x.shape
        heads, head_dim = self.num_heads, width // self.num_heads
        init, dtypes, precision = self.residual.kernel_init, self.dtypes, self.dtypes.precision

        x = nn.Dense(3 * width, kernel_init=init("qkv"), name="qkv", **dtypes.dense)(x)
        # Split before the heads are: on TPUs an array with a last axis of head_dim 48 is padded to 128.
        q, k, v = jnp.split(saveable(x), 3, axis=-1)
        scale = head_dim**-0.5
        if not self.talking_heads:
            q = q * scale
        q, k, v = (part.reshape(batch, tokens, heads, head_dim) for part in (q, k, v))
        if self.talking_heads:
            pre_weight, pre_bias = HeadMixing(heads, dtypes.param_dtype, name="proj_l").weights()
            pre = pre_weight * scale, pre_bias  # a few numbers are scaled instead of every query
            post = HeadMixing(heads, dtypes.param_dtype, name="proj_w").weights()

        dropped = self.attention_dropout > 0.0 and example_ids is not None
        recorded = self.is_initializing() or self.is_mutable_collection("intermediates")
        if self.talking_heads and not dropped and not recorded:
            x = kernels.talking_heads_attention(
                q, k, v, *pre, *post, implementation=self.implementation, precision=precision
            )
            x = saveable(x)
        else:
            maps = kernels.attention_logits(q, k, precision)
            record(self, "logits", maps * scale if self.talking_heads else maps)
            if self.talking_heads:
                maps = kernels.mix_heads(maps, *pre, precision)
                record(self, "mixed_logits", maps)
            maps = nn.softmax(maps, axis=-1)
            record(self, "softmax", maps)
            if self.talking_heads:
                maps = kernels.mix_heads(maps, *post, precision)
                record(self, "mixed_softmax", maps)
            maps = Dropout(self.attention_dropout, name="attn_drop")(maps, example_ids)
            x = kernels.weighted_sum(maps, v, precision)

        x = x.reshape(batch, tokens, width)
        x = saveable(nn.Dense(width, kernel_init=init("proj"), name="proj", **dtypes.dense)(x))
        return Dropout(self.projection_dropout, name="proj_drop")(x, example_ids)


class ClassAttention(nn.Module):
    """Attention of the class token to itself and the patches (paper, section 3, equations 5 to 7).

    Records `softmax`, (batch, heads, 1, 1 + patches).
    """

    num_heads: int
    residual: Residual = Residual()
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, u: Float[Array, "batch all_tokens d"]) -> ClassToken:
        """Returns the class token's update; `u` is the class token, then the patches."""
        batch, tokens, width = u.shape
        heads, head_dim = self.num_heads, width // self.num_heads
        init, dtypes, precision = self.residual.kernel_init, self.dtypes, self.dtypes.precision

        q = saveable(nn.Dense(width, kernel_init=init("q"), name="q", **dtypes.dense)(u[:, :1]))
        q = q.reshape(batch, 1, heads, head_dim)
        k = saveable(nn.Dense(width, kernel_init=init("k"), name="k", **dtypes.dense)(u))
        k = k.reshape(batch, tokens, heads, head_dim)
        v = saveable(nn.Dense(width, kernel_init=init("v"), name="v", **dtypes.dense)(u))
        v = v.reshape(batch, tokens, heads, head_dim)

        softmax = nn.softmax(kernels.attention_logits(q * head_dim**-0.5, k, precision), axis=-1)
        record(self, "softmax", softmax)
        x = kernels.weighted_sum(softmax, v, precision).reshape(batch, 1, width)
        return saveable(nn.Dense(width, kernel_init=init("proj"), name="proj", **dtypes.dense)(x))


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them.

    GELU is rematerialised in the backward pass: JAX's derivative of it keeps four arrays of the hidden width.
    """

    hidden: int
    dropout: float = 0.0
    residual: Residual = Residual()
    dtypes: DtypePolicy = DtypePolicy()

    @functools.partial(nn.remat, policy=SAVE_MATMULS)
    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Maps the last axis of `x` to `hidden` channels and back."""
        width, init, dtypes = x.shape[-1], self.residual.kernel_init, self.dtypes

        x = saveable(nn.Dense(self.hidden, kernel_init=init("fc1"), name="fc1", **dtypes.dense)(x))
        x = nn.gelu(x, approximate=False)
        x = Dropout(self.dropout, name="drop1")(x, example_ids)
        x = saveable(nn.Dense(width, kernel_init=init("fc2"), name="fc2", **dtypes.dense)(x))
        return Dropout(self.dropout, name="drop2")(x, example_ids)


def scaled(y: Tokens, number: int, residual: Residual, dtypes: DtypePolicy) -> Tokens:
    """Scales a block's branch `number`, 1 or 2."""
    if residual.scheme == "layerscale":
        return LayerScale(residual.init_scale, dtypes, name=f"layer_scale_{number}")(y)
    return scale_branch(y, number, residual, dtypes)


class SelfAttentionBlock(nn.Module):
    """One block of the first stage (paper, equation 4): the tokens attend to each other.

    Records `features`, the block's output.
    """

    attention: Callable[..., nn.Module]  # SelfAttention with its attributes; `nn.remat` of it
    mlp_ratio: float
    drop_path_rate: float = 0.0
    dropout: float = 0.0
    residual: Residual = Residual()
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(
        self, x: Tokens, example_ids: ExampleIds = None, drop_path_scale: DropPathScale = 1.0
    ) -> Tokens:
        """Adds attention and MLP to the tokens `x`; random only where `example_ids` are given."""
        residual, dtypes = self.residual, self.dtypes

        y = LayerNorm(name="norm1", **dtypes.norm)(x) if residual.norm else x
        y = self.attention(name="attn")(y, example_ids)
        y = scaled(y, 1, residual, dtypes)
        x = x + StochasticDepth(self.drop_path_rate, name="drop_path_1")(
            y, example_ids, drop_path_scale
        )

        y = LayerNorm(name="norm2", **dtypes.norm)(x) if residual.norm else x
        hidden = int(self.mlp_ratio * x.shape[-1])
        y = Mlp(hidden, self.dropout, residual, dtypes, name="mlp")(y, example_ids)
        y = scaled(y, 2, residual, dtypes)
        x = x + StochasticDepth(self.drop_path_rate, name="drop_path_2")(
            y, example_ids, drop_path_scale
        )

        record(self, "features", x)
        return x


class ClassAttentionBlock(nn.Module):
    """One block of the second stage (paper, section 3): the class token reads the patches.

    It returns the class token alone: the patches do not change here. No dropout, no stochastic depth; no MLP
    if `mlp_ratio` is 0. Records `features`, the class token.
    """

    num_heads: int
    mlp_ratio: float
    residual: Residual = Residual()
    dtypes: DtypePolicy = DtypePolicy()

    @nn.compact
    def __call__(self, cls: ClassToken, patches: Tokens) -> ClassToken:
        """Adds class attention and MLP to the class token `cls`."""
        residual, dtypes = self.residual, self.dtypes

        y = jnp.concatenate([cls, patches], axis=1)
        y = LayerNorm(name="norm1", **dtypes.norm)(y) if residual.norm else y
        y = ClassAttention(self.num_heads, residual, dtypes, name="attn")(y)
        cls = cls + scaled(y, 1, residual, dtypes)

        if self.mlp_ratio:
            y = LayerNorm(name="norm2", **dtypes.norm)(cls) if residual.norm else cls
            hidden = int(self.mlp_ratio * cls.shape[-1])
            y = Mlp(hidden, residual=residual, dtypes=dtypes, name="mlp")(y)
            cls = cls + scaled(y, 2, residual, dtypes)

        record(self, "features", cls)
        return cls


class CaiT(nn.Module):
    """The network. `cait_jax.create_model` sets the attributes of the named models.

    Attributes:
      image_size: (height, width) in pixels, both multiples of `patch_size`.
      width: channels d of a token; a multiple of `num_heads`, which both kinds of attention have.
      depth: number of self-attention blocks.
      num_classes: classes of the head; 0 for no head, which gives the features before it.
      in_channels: channels of the image.
      patch_size: side of a patch in pixels.
      mlp_ratio: hidden width of an MLP over `width`.
      residual: residual scheme, one of `cait_jax.models.residual.SCHEMES`.
      block_norm: whether residual branches read the normalised stream.
      layer_scale_init: start value of every LayerScale gamma, or of the scalars of `residual="scalar"`.
      talking_heads: mix the heads of self-attention before and after its softmax.
      class_token: `"class_attention"`: after the patches, in `class_depth` blocks of its own. `"input"`:
        among the patches from the start, with a position embedding, as in ViT. A number k: joins the patches
        before block k, counted from 0, without a position. `"mean"`: none; the head reads the mean patch.
      class_depth: number of class-attention blocks; by default 2, or 0 without class attention.
      class_mlp_ratio: `mlp_ratio` of the class-attention blocks if it differs; 0 for no MLP in them.
      distilled: a second token and head beside those of `class_token="input"`, for a teacher (DeiT).
      drop_path_rate: stochastic-depth rate of the self-attention blocks.
      drop_path_growth: `"constant"`, or `"linear"` (DeiT): from 0 in the first block up to it in the last.
      embedding_dropout: rate after the position embedding.
      attention_dropout: rate on the attention weights.
      projection_dropout: rate after the projection of self-attention; `dropout` if not given.
      dropout: rate in the MLP.
      dtype: of the computation; softmax and logits are at least float32.
      param_dtype: of the parameters.
      precision: of matmuls; `"highest"` for exact runs.
      remat: what is rematerialised in the backward pass: `"none"`; `"elementwise"`: in a block everything but
        matmuls and attention as a whole; `"attention"`; `"block"`: whole blocks. Norms and GELU always are.
      attention: one of `cait_jax.kernels.IMPLEMENTATIONS`, all the same function; None: the backend's best.
      stacked: blocks in one `nn.scan`, parameters along a leading depth axis; False if a token joins at block k.

    Raises:
      ValueError: for attributes that do not fit, and from a call for images of another size.
    """

    image_size: tuple[int, int]
    width: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    in_channels: int = 3
    patch_size: int = 16
    mlp_ratio: float = 4.0
    residual: str = "layerscale"
    block_norm: bool = True
    layer_scale_init: float = 1e-5
    talking_heads: bool = True
    class_token: str | int = "class_attention"
    class_depth: int | None = None
    class_mlp_ratio: float | None = None
    distilled: bool = False
    drop_path_rate: float = 0.0
    drop_path_growth: str = "constant"
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    projection_dropout: float | None = None
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    remat: str = "none"
    attention: str | None = None
    stacked: bool = True

    def __post_init__(self) -> None:
        """Completes and checks the attributes."""
        complete_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, images: Images, train: bool = False, example_ids: ExampleIds = None
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          images: normalised, (batch, height, width, in_channels).
          train: draw dropout (`rngs["dropout"]`) and stochastic depth (`rngs["drop_path"]`).
          example_ids: position of each image in the global batch, which its draws depend on; by default from 0.

        Returns:
          Logits (batch, num_classes), or features (batch, width) if `num_classes` is 0, at least float32; of a
          distilled network the mean over both tokens, whose `logits_class` and `logits_distillation` are recorded.
        """
        check_images(self, images)
        if train and example_ids is None:
            example_ids = jnp.arange(images.shape[0])
        example_ids = example_ids if train else None
        dtypes = DtypePolicy(self.dtype, self.param_dtype, self.precision)
        blocks = self.depth + (self.class_depth or 0)
        residual = Residual(self.residual, self.block_norm, self.layer_scale_init, blocks)

        x = jnp.asarray(images, self.dtype)
        x = PatchEmbed(self.width, self.patch_size, dtypes, name="patch_embed")(x)
        if self.class_token == "input":
            names = ("cls_token", "dist_token") if self.distilled else ("cls_token",)
            x = jnp.concatenate([*(self._token(name, x) for name in names), x], axis=1)
        pos_embed = self.param("pos_embed", LINEAR_INIT, (1, *x.shape[1:]), self.param_dtype)
        x = x + pos_embed.astype(self.dtype)
        x = Dropout(self.embedding_dropout, name="pos_drop")(x, example_ids)

        with scalar_biases(residual, dtypes):
            x = self._self_attention_stage(x, example_ids, residual, dtypes)
            if self.class_token == "class_attention":
                cls = self._token("cls_token", x)
                mlp_ratio = self.mlp_ratio if self.class_mlp_ratio is None else self.class_mlp_ratio
                block = functools.partial(ClassAttentionBlock, self.num_heads, mlp_ratio)
                for i in range(self.class_depth or 0):
                    cls = block(residual, dtypes, name=f"blocks_token_only_{i}")(cls, x)
                x = cls
            elif self.class_token != "mean":
                x = x[:, : 1 + self.distilled]

        x = LayerNorm(name="norm", **dtypes.norm)(x)
        features = x.mean(axis=1)
        record(self, "features", features)
        if self.num_classes == 0:
            return features.astype(dtypes.accum_dtype)
        dtypes = DtypePolicy(dtypes.accum_dtype, self.param_dtype, self.precision)
        init = residual.kernel_init("head")
        head = functools.partial(nn.Dense, self.num_classes, kernel_init=init, **dtypes.dense)
        if not self.distilled:
            return head(name="head")(features)
        logits, logits_dist = head(name="head")(x[:, 0]), head(name="head_dist")(x[:, 1])
        record(self, "logits_class", logits)
        record(self, "logits_distillation", logits_dist)
        return (logits + logits_dist) / 2

    def _token(self, name: str, x: Tokens) -> ClassToken:
        token = self.param(name, LINEAR_INIT, (1, 1, self.width), self.param_dtype)
        return jnp.broadcast_to(token.astype(self.dtype), (x.shape[0], 1, self.width))

    def _self_attention_stage(
        self, x: Tokens, example_ids: ExampleIds, residual: Residual, dtypes: DtypePolicy
    ) -> Float[Array, "batch all_tokens d"]:
        """Applies the `depth` self-attention blocks, stacked or one by one."""
        attention: Any = SelfAttention
        block: Any = SelfAttentionBlock
        # Inside a scan CSE cannot undo rematerialisation, and preventing it costs.
        remat = functools.partial(nn.remat, prevent_cse=not self.stacked)
        if self.remat == "attention":
            attention = remat(attention)
        elif self.remat == "block":
            block = remat(block)
        elif self.remat == "elementwise":
            block = remat(block, policy=SAVE_MATMULS)
        projection = self.dropout if self.projection_dropout is None else self.projection_dropout
        rates = self.attention_dropout, projection
        attention = functools.partial(
            attention, self.num_heads, self.talking_heads, *rates, self.attention, residual, dtypes
        )
        block = functools.partial(
            block, attention, self.mlp_ratio, self.drop_path_rate, self.dropout, residual, dtypes
        )
        scales = jnp.linspace(0.0, 1.0, self.depth) if self.drop_path_growth == "linear" else None

        if self.stacked:
            return scan_blocks(block(name="blocks"), self.depth, x, example_ids, scales)
        for i in range(self.depth):
            if i == self.class_token:
                x = jnp.concatenate([self._token("cls_token", x), x], axis=1)
            x = block(name=f"blocks_{i}")(x, example_ids, 1.0 if scales is None else scales[i])
        return x
