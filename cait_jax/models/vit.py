"""ViT (Dosovitskiy et al., arXiv 2010.11929) and its relatives, as `CaiT` with other tokens before the patches."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.models.cait import CaiT
from cait_jax.models.layers import Activation, Tokens, gelu


class VisionTransformer(CaiT):
    """`CaiT` with the choices of ViT as defaults.

    DeiT (arXiv 2012.12877) adds `distilled`; DeiT III (2204.07118) LayerScale, and no position of the class token;
    DINOv2 (2304.07193) LayerScale, `registers` (Darcet et al., 2309.16588) and in its largest network `swiglu`;
    MAE (2111.06377) is fine-tuned with `mean_pool`.
    """

    residual: str = "plain"
    talking_heads: bool = False
    class_token: str | int = "input"
    drop_path_growth: str = "linear"
    class_position: bool = True  # whether class token and registers have positions, as patches do
    registers: int = 0  # learned tokens after the class token, which no head reads
    mean_pool: bool = False  # the head reads the mean of the patches, which is then normalised
    swiglu: bool = (
        False  # gated MLPs: silu(a) * b of the halves (a, b) of `fc1` (Shazeer, 2002.05202)
    )

    def __post_init__(self) -> None:
        """Checks the attributes."""
        if self.registers < 0:
            raise ValueError(f"registers {self.registers} must be 0 or more")
        own = ("class_position", "registers", "mean_pool")
        given = [name for name in own if getattr(self, name) != getattr(VisionTransformer, name)]
        if given and self.class_token != "input":
            raise ValueError(
                f"{given[0]} {getattr(self, given[0])} goes with class_token 'input', not {self.class_token!r}"
            )
        if self.distilled and self.mean_pool:
            raise ValueError("mean_pool True leaves the two tokens of distilled unread: choose one")
        super().__post_init__()

    @property
    def prefix(self) -> dict[str, int]:
        """Names and numbers of the tokens in front of the patches."""
        registers = {"reg_token": self.registers} if self.registers else {}
        return super().prefix | registers

    @property
    def activation(self) -> Activation:
        """Of the MLPs, from `fc1` to `fc2`."""
        return _swiglu if self.swiglu else gelu

    def position_embedding(self, tokens: int) -> Float[Array, "1 tokens d"]:
        """The position embedding; zeros for tokens that have none."""
        if self.class_position:
            return super().position_embedding(tokens)
        prefix = sum(self.prefix.values())
        return jnp.pad(super().position_embedding(tokens - prefix), ((0, 0), (prefix, 0), (0, 0)))

    def read(self, x: Tokens) -> tuple[str, Float[Array, "batch read d"]]:
        """The name of the last norm, and the tokens that it takes."""
        if not self.mean_pool:
            return super().read(x)
        return "fc_norm", x[:, sum(self.prefix.values()) :].mean(axis=1, keepdims=True)


def _swiglu(x: Array) -> Array:
    half = x.shape[-1] // 2
    return jax.nn.silu(x[..., :half]) * x[..., half:]
