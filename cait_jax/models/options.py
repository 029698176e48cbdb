"""Which attributes of a network fit each other."""

from typing import Any

from cait_jax.kernels.talking_heads import IMPLEMENTATIONS
from cait_jax.models.residual import ALWAYS_NORMED, SCHEMES

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
