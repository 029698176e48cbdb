"""CaiT: Touvron et al., "Going deeper with Image Transformers", ICCV 2021, arXiv 2103.17239.

Patches attend to each other in `depth` self-attention blocks, with no class token among them. Then the
patches are frozen, and a class token reads them in `class_depth` class-attention blocks. Every residual
branch is scaled by LayerScale, which is what lets the network be this deep.
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from cait_jax.models.attention import ClassAttention, TalkingHeadsAttention
from cait_jax.models.layers import (
    LINEAR_INIT,
    Dropout,
    ExampleIds,
    Images,
    LayerScale,
    Mlp,
    Numerics,
    PatchEmbed,
    StochasticDepth,
    Tokens,
    record,
)

ClassToken = Float[Array, "batch 1 d"]


class SelfAttentionBlock(nn.Module):
    """One block of the first stage (paper, equation 4): the patches talk to each other.

    Records `features`, the block's output.
    """

    num_heads: int
    mlp_ratio: float
    layer_scale_init: float
    drop_path: float = 0.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    attention: Any = TalkingHeadsAttention
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Adds attention and MLP to the patches `x`; randomness only where `example_ids` are given."""
        numerics = self.numerics
        attention = self.attention(
            self.num_heads, self.attention_dropout, self.dropout, numerics, name="attn"
        )
        mlp = Mlp(int(self.mlp_ratio * x.shape[-1]), self.dropout, numerics, name="mlp")

        branch = attention(numerics.norm("norm1")(x), example_ids)
        branch = LayerScale(self.layer_scale_init, numerics, name="layer_scale_1")(branch)
        x = x + StochasticDepth(self.drop_path, name="drop_path_1")(branch, example_ids)

        branch = mlp(numerics.norm("norm2")(x), example_ids)
        branch = LayerScale(self.layer_scale_init, numerics, name="layer_scale_2")(branch)
        x = x + StochasticDepth(self.drop_path, name="drop_path_2")(branch, example_ids)

        record(self, "features", x)
        return x


class ClassAttentionBlock(nn.Module):
    """One block of the second stage (paper, section 3): the class token reads the patches.

    It returns the class token alone: the patches cannot change here. No dropout, no stochastic depth.
    Records `features`, the class token.
    """

    num_heads: int
    mlp_ratio: float
    layer_scale_init: float
    numerics: Numerics = Numerics()

    @nn.compact
    def __call__(self, cls: ClassToken, patches: Tokens) -> ClassToken:
        """Adds class attention and MLP to the class token `cls`."""
        numerics = self.numerics
        u = jnp.concatenate([cls, patches], axis=1)

        branch = ClassAttention(self.num_heads, numerics, name="attn")(numerics.norm("norm1")(u))
        cls = cls + LayerScale(self.layer_scale_init, numerics, name="layer_scale_1")(branch)

        mlp = Mlp(int(self.mlp_ratio * cls.shape[-1]), numerics=numerics, name="mlp")
        branch = mlp(numerics.norm("norm2")(cls))
        cls = cls + LayerScale(self.layer_scale_init, numerics, name="layer_scale_2")(branch)

        record(self, "features", cls)
        return cls


class CaiT(nn.Module):
    """The network. `cait_jax.create_model` fills these in for the paper's models.

    Attributes:
      image_size: (height, width) in pixels, both multiples of `patch_size`.
      width: channels d of a token.
      depth: number of self-attention blocks.
      num_heads: heads of both kinds of attention; divides `width`.
      num_classes: classes of the head; 0 for no head, which gives the features before it.
      in_channels: channels of the image.
      patch_size: side of a patch in pixels.
      class_depth: number of class-attention blocks.
      mlp_ratio: hidden width of an MLP over `width`, in both stages.
      layer_scale_init: start value of every LayerScale gamma.
      drop_path: stochastic-depth rate, the same in every self-attention block.
      embedding_dropout: rate after the position embedding.
      attention_dropout: rate on the attention weights.
      dropout: rate in the MLP and after the attention's projection.
      dtype: of the computation; softmax and logits are at least float32.
      param_dtype: of the parameters.
      precision: of matrix products; `"highest"` for exact runs.
      remat: what the backward pass recomputes: nothing, attention, or whole blocks.
      stacked: blocks in one `nn.scan`, their parameters stacked along a leading depth axis (compiles
        once for all), or each block on its own.

    Raises:
      ValueError: from the constructor, for sizes, head counts or rates that do not fit.
    """

    image_size: tuple[int, int]
    width: int
    depth: int
    num_heads: int
    num_classes: int = 1000
    in_channels: int = 3
    patch_size: int = 16
    class_depth: int = 2
    mlp_ratio: float = 4.0
    layer_scale_init: float = 1e-5
    drop_path: float = 0.0
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    dropout: float = 0.0
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    precision: Any = None
    remat: str = "none"  # "none", "attention" or "block"
    stacked: bool = True

    def __post_init__(self) -> None:
        """Refuses what could only fail later, or compute something else than was meant."""
        height, width = self.image_size
        if height < 1 or width < 1 or height % self.patch_size or width % self.patch_size:
            raise ValueError(
                f"image_size {height}x{width} cannot be cut in patches of {self.patch_size}x"
                f"{self.patch_size}: both sides must be multiples of {self.patch_size}"
            )
        if self.num_heads < 1 or self.width % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide width {self.width}: "
                "every head needs the same number of channels"
            )
        if self.depth < 1 or self.class_depth < 1:
            raise ValueError(
                f"depth {self.depth} and class_depth {self.class_depth} must both be at least 1"
            )
        if self.num_classes < 0:
            raise ValueError(f"num_classes {self.num_classes} must be 0 or more; 0 gives features")
        for name in ("drop_path", "embedding_dropout", "attention_dropout", "dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name} {getattr(self, name)} must lie in [0, 1)")
        if self.remat not in ("none", "attention", "block"):
            raise ValueError(f"remat {self.remat!r} must be one of none, attention, block")
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

        x = PatchEmbed(self.width, self.patch_size, numerics, name="patch_embed")(
            jnp.asarray(images, self.dtype)
        )
        pos_embed = self.param("pos_embed", LINEAR_INIT, (1, *x.shape[1:]), self.param_dtype)
        x = x + pos_embed.astype(self.dtype)
        x = Dropout(self.embedding_dropout, name="pos_drop")(x, example_ids)

        x = self._self_attention_stage(x, example_ids, numerics)

        cls = self.param("cls_token", LINEAR_INIT, (1, 1, self.width), self.param_dtype)
        cls = jnp.broadcast_to(cls.astype(self.dtype), (x.shape[0], 1, self.width))
        for i in range(self.class_depth):
            cls = ClassAttentionBlock(
                self.num_heads,
                self.mlp_ratio,
                self.layer_scale_init,
                numerics,
                name=f"blocks_token_only_{i}",
            )(cls, x)

        features = numerics.norm("norm")(cls)[:, 0]
        record(self, "features", features)
        if self.num_classes == 0:
            return features.astype(numerics.wide)
        head = Numerics(numerics.wide, self.param_dtype, self.precision)
        return head.dense(self.num_classes, name="head")(features)

    def _self_attention_stage(
        self, x: Tokens, example_ids: ExampleIds, numerics: Numerics
    ) -> Tokens:
        """Applies the `depth` self-attention blocks, stacked or one by one."""
        block_class: Any = SelfAttentionBlock
        attention: Any = TalkingHeadsAttention
        # Inside a scan, common subexpressions cannot undo the recomputation, and forbidding them costs.
        if self.remat == "attention":
            attention = nn.remat(attention, prevent_cse=not self.stacked)
        elif self.remat == "block":
            block_class = nn.remat(block_class, prevent_cse=not self.stacked)

        def block(name: str) -> nn.Module:
            return block_class(
                self.num_heads,
                self.mlp_ratio,
                self.layer_scale_init,
                self.drop_path,
                self.dropout,
                self.attention_dropout,
                attention,
                numerics,
                name=name,
            )

        if not self.stacked:
            for i in range(self.depth):
                x = block(f"blocks_{i}")(x, example_ids)
            return x

        scan = nn.scan(
            lambda block, x, _: (block(x, example_ids), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True, "dropout": True, "drop_path": True},
            length=self.depth,
        )
        x, _ = scan(block("blocks"), x, None)
        return x
