"""ViT (Dosovitskiy et al., arXiv 2010.11929) and DeiT (Touvron et al., arXiv 2012.12877).

The network of `cait.py` with other choices: the class token is among the patches from the start, heads
do not talk, residual branches are added as they are.
"""

from cait_jax.models.cait import CaiT


class VisionTransformer(CaiT):
    """The network of `CaiT` with ViT's choices as defaults; `distilled=True` for DeiT's second token."""

    residual: str = "plain"
    talking_heads: bool = False
    class_token: str | int = "input"
    drop_path_growth: str = "linear"
