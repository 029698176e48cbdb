"""CaiT: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239.

Patches attend to each other in `depth` self-attention blocks, with no class token among them. Then the
patches are frozen, and a class token reads them in `class_depth` class-attention blocks. Every residual
branch is scaled by LayerScale, which is what lets the network be this deep.

What the paper compares itself with is an option: `residual`, `talking_heads` and `class_token`. With ViT's
choices the network is ViT (`cait_jax.models.vit`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from cait_jax.models.attention import ClassAttention, SelfAttention
from cait_jax.models.layers import (
    LINEAR_INIT,
    PRODUCT,
    Dropout,
    ExampleIds,
    Images,
    Numerics,
    PatchEmbed,
    Share,
    StochasticDepth,
    Tokens,
    record,
)
from cait_jax.models.mlp import Mlp
from cait_jax.models.options import check_options
from cait_jax.models.residual import Residual

ClassToken = Float[Array, "batch 1 d"]


class SelfAttentionBlock(nn.Module):
    """One block of the first stage (paper, equation 4): the tokens talk to each other.

    Records `features`, the block's output.
    """

    num_heads: int
    mlp_ratio: float
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    projection_dropout: float = 0.0
    talking_heads: bool = True
    attention: Any = SelfAttention
    residual: Residual = Residual()

    @nn.compact
    def __call__(
        self, x: Tokens, example_ids: ExampleIds = None, drop_path_share: Share = 1.0
    ) -> Tokens:
        """Adds attention and MLP to the tokens `x`; randomness only where `example_ids` are given."""
        residual = self.residual
        attention = self.attention(
            self.num_heads,
            self.talking_heads,
            self.attention_dropout,
            self.projection_dropout,
            residual,
            name="attn",
        )
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), self.dropout, residual, name="mlp")
        drop_path_1 = StochasticDepth(self.drop_path, name="drop_path_1")
        drop_path_2 = StochasticDepth(self.drop_path, name="drop_path_2")

        branch = attention(residual.normed(x, "norm1"), example_ids)
        x = x + drop_path_1(residual.scaled(branch, 1), example_ids, drop_path_share)

        branch = mlp(residual.normed(x, "norm2"), example_ids)
        x = x + drop_path_2(residual.scaled(branch, 2), example_ids, drop_path_share)

        record(self, "features", x)
        return x


class ClassAttentionBlock(nn.Module):
    """One block of the second stage (paper, section 3): the class token reads the patches.

    It returns the class token alone: the patches cannot change here. No dropout, no stochastic depth.
    Records `features`, the class token. Without a ratio it has no MLP.
    """

    num_heads: int
    mlp_ratio: float
    residual: Residual = Residual()

    @nn.compact
    def __call__(self, cls: ClassToken, patches: Tokens) -> ClassToken:
        """Adds class attention and MLP to the class token `cls`."""
        residual = self.residual
        u = jnp.concatenate([cls, patches], axis=1)

        attention = ClassAttention(self.num_heads, residual, name="attn")
        cls = cls + residual.scaled(attention(residual.normed(u, "norm1")), 1)

        if self.mlp_ratio:
            mlp = Mlp(int(self.mlp_ratio * cls.shape[-1]), residual=residual, name="mlp")
            cls = cls + residual.scaled(mlp(residual.normed(cls, "norm2")), 2)

        record(self, "features", cls)
        return cls


class CaiT(nn.Module):
    """The network. `cait_jax.create_model` fills these in for the named models.

    Attributes:
      image_size: (height, width) in pixels, both multiples of `patch_size`.
      width: channels d of a token.
      depth: number of self-attention blocks.
      num_heads: heads of both kinds of attention; divides `width`.
      num_classes: classes of the head; 0 for no head, which gives the features before it.
      in_channels: channels of the image.
      patch_size: side of a patch in pixels.
      mlp_ratio: hidden width of an MLP over `width`.
      residual: how residual branches start and are added: a scheme of `cait_jax.models.residual`.
      block_norm: whether residual branches read the normalised stream.
      layer_scale_init: start value of every LayerScale gamma, or of the scalars of `residual="scalar"`.
      talking_heads: mix the heads of self-attention before and after its softmax.
      class_token: where a token gathers what the head reads. `"class_attention"`: after the patches, in
        `class_depth` blocks of its own. `"input"`: among the patches from the start, with a position
        embedding of its own, as in ViT. A number k: it joins the patches before block k, counted from
        0, and has no position. `"mean"`: nowhere; the head reads the mean of the patches.
      class_depth: number of class-attention blocks; 2, or 0 without class attention, if not given.
      class_mlp_ratio: `mlp_ratio` of the class-attention blocks if it differs; 0 for no MLP in them.
      distilled: a second token and head beside those of `class_token="input"`, for a teacher (DeiT).
      drop_path: stochastic-depth rate of the self-attention blocks.
      drop_path_growth: `"constant"`: the rate is the same in every block; `"linear"`: it grows from 0
        in the first block to `drop_path` in the last, as in DeiT.
      embedding_dropout: rate after the position embedding.
      attention_dropout: rate on the attention weights.
      projection_dropout: rate after the projection of self-attention; `dropout` if not given.
      dropout: rate in the MLP.
      dtype: of the computation; softmax and logits are at least float32.
      param_dtype: of the parameters.
      precision: of matrix products; `"highest"` for exact runs.
      remat: what the backward pass computes anew: `"none"`; `"elementwise"`: in a block everything but matrix
        products and attention as a whole; `"attention"`; `"block"`: whole blocks.
      attention: how self-attention is computed: an implementation of `cait_jax.kernels`; None: as is known to be
        best on JAX's default backend. The function is the same.
      stacked: blocks in one `nn.scan`, their parameters stacked along a leading depth axis (compiles
        once for all), or each block on its own. A token that joins at block k changes the number of
        tokens on the way, and blocks are on their own then.

    Raises:
      ValueError: from the constructor, for sizes, head counts, rates or options that do not fit.
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
    drop_path: float = 0.0
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
        """Refuses what could only fail later, or compute something else than was meant."""
        if isinstance(self.class_token, str) and self.class_token.isdecimal():  # of a command line
            object.__setattr__(self, "class_token", int(self.class_token))
        class_attention = self.class_token == "class_attention"
        if self.class_depth is None:
            object.__setattr__(self, "class_depth", 2 if class_attention else 0)
        if isinstance(self.class_token, int):
            object.__setattr__(self, "stacked", False)
        check_options(self)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: Images,
        train: bool = False,
        example_ids: Int[Array, "batch"] | None = None,
    ) -> Float[Array, "batch outputs"]:
        """Classifies images.

        Args:
          images: normalised float images, (batch, height, width, in_channels).
          train: draw dropout (`rngs["dropout"]`) and stochastic depth (`rngs["drop_path"]`).
          example_ids: position of each image in the global batch, which its draws belong to; counted
            from 0 if not given. Unused where `train` is False.

        Returns:
          Logits (batch, num_classes), or features (batch, width) if `num_classes` is 0, at least float32.
          Of a distilled network the mean of both heads, which it records as `logits_class` and
          `logits_distillation`; its features are the mean of both tokens.

        Raises:
          ValueError: if the images are not of `image_size` and `in_channels`.
        """
        if images.shape[1:] != (*self.image_size, self.in_channels):
            raise ValueError(
                f"images of shape {images.shape[1:]} do not fit a model for "
                f"{(*self.image_size, self.in_channels)} (height, width, channels): resize them, or "
                "create the model with that image_size and in_channels"
            )
        if not train:
            example_ids = None
        elif example_ids is None:
            example_ids = jnp.arange(images.shape[0])
        numerics = Numerics(self.dtype, self.param_dtype, self.precision)
        blocks = self.depth + (self.class_depth or 0)
        residual = Residual(self.residual, self.block_norm, self.layer_scale_init, blocks, numerics)

        x = PatchEmbed(self.width, self.patch_size, numerics, name="patch_embed")(
            jnp.asarray(images, self.dtype)
        )
        if self.class_token == "input":
            names = ("cls_token", "dist_token") if self.distilled else ("cls_token",)
            x = jnp.concatenate([*(self._token(name, len(x)) for name in names), x], axis=1)
        pos_embed = self.param("pos_embed", LINEAR_INIT, (1, *x.shape[1:]), self.param_dtype)
        x = x + pos_embed.astype(self.dtype)
        x = Dropout(self.embedding_dropout, name="pos_drop")(x, example_ids)

        x = self._self_attention_stage(x, example_ids, residual)

        if self.class_token == "class_attention":
            cls = self._token("cls_token", len(x))
            for i in range(self.class_depth or 0):
                mlp_ratio = self.mlp_ratio if self.class_mlp_ratio is None else self.class_mlp_ratio
                cls = ClassAttentionBlock(
                    self.num_heads, mlp_ratio, residual, name=f"blocks_token_only_{i}"
                )(cls, x)
            x = cls
        elif self.class_token != "mean":
            x = x[:, : 1 + self.distilled]

        return self._heads(numerics.norm("norm")(x), residual)

    def _token(self, name: str, batch: int) -> ClassToken:
        """A learned token, the same for every image."""
        token = self.param(name, LINEAR_INIT, (1, 1, self.width), self.param_dtype)
        return jnp.broadcast_to(token.astype(self.dtype), (batch, 1, self.width))

    def _self_attention_stage(
        self, x: Tokens, example_ids: ExampleIds, residual: Residual
    ) -> Float[Array, "batch all_tokens d"]:
        """Applies the `depth` self-attention blocks, stacked or one by one."""
        block_class: Any = SelfAttentionBlock
        attention: Any = SelfAttention
        # Inside a scan, common subexpressions cannot undo the recomputation, and forbidding them costs.
        if self.remat == "attention":
            attention = nn.remat(attention, prevent_cse=not self.stacked)
        elif self.remat == "block":
            block_class = nn.remat(block_class, prevent_cse=not self.stacked)
        elif self.remat == "elementwise":
            kept = jax.checkpoint_policies.save_only_these_names(PRODUCT)
            block_class = nn.remat(block_class, prevent_cse=not self.stacked, policy=kept)

        def block(name: str) -> nn.Module:
            return block_class(
                self.num_heads,
                self.mlp_ratio,
                self.drop_path,
                self.dropout,
                self.attention_dropout,
                self.dropout if self.projection_dropout is None else self.projection_dropout,
                self.talking_heads,
                functools.partial(attention, implementation=self.attention),
                residual,
                name=name,
            )

        shares = None
        if self.drop_path_growth == "linear":
            shares = jnp.linspace(0.0, 1.0, self.depth)

        if not self.stacked:
            for i in range(self.depth):
                if i == self.class_token:
                    x = jnp.concatenate([self._token("cls_token", len(x)), x], axis=1)
                x = block(f"blocks_{i}")(x, example_ids, 1.0 if shares is None else shares[i])
            return x

        scan = nn.scan(
            lambda block, x, share: (block(x, example_ids, 1.0 if share is None else share), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, "drop_path": True},
            length=self.depth,
        )
        x, _ = scan(block("blocks"), x, shares)
        return x

    def _heads(self, x: Tokens, residual: Residual) -> Float[Array, "batch outputs"]:
        """Reads the normed tokens that are left: one, two of a distilled network, or all the patches."""
        features = x.mean(axis=1)
        record(self, "features", features)
        wide = residual.numerics.wide
        if self.num_classes == 0:
            return features.astype(wide)
        numerics = Numerics(wide, self.param_dtype, self.precision)

        def head(name: str) -> nn.Dense:
            return numerics.dense(self.num_classes, name=name, kernel_init=residual.head_init)

        if not self.distilled:
            return head("head")(features)
        of_class, of_teacher = head("head")(x[:, 0]), head("head_dist")(x[:, 1])
        record(self, "logits_class", of_class)
        record(self, "logits_distillation", of_teacher)
        return (of_class + of_teacher) / 2
