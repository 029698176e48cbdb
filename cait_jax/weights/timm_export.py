"""A model for PyTorch users: weights that timm loads strictly, and a model card."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError, Way, advise
from cait_jax.models.cait import CaiT
from cait_jax.models.zoo import create_model
from cait_jax.weights.hub import RELEASED
from cait_jax.weights.saved import (
    CONFIG,
    SECTION,
    WEIGHTS,
    checked_state_dict,
    config_section,
    config_writer,
)
from cait_jax.weights.state_dicts import replace_files, safetensors_writer, write_safetensors

# The values of our attributes that timm's classes have.
_CAIT_OPTIONS = {
    "residual": ("layerscale",),
    "block_norm": (True,),
    "talking_heads": (True,),
    "class_token": ("class_attention",),
}
_VIT_OPTIONS = {
    "residual": ("plain", "layerscale"),
    "block_norm": (True,),
    "talking_heads": (False,),
    "class_token": ("input", "mean"),
}


@dataclasses.dataclass(frozen=True)
class TimmModel:
    """How timm makes the same network.

    Attributes:
      constructor: dotted path of the class.
      arguments: of the constructor.
      entry_point: a model of timm's registry of this class.
      named: the arguments with which `entry_point` is this network; None if they would be more than image
        size, channels and classes.
      first_conv: name of the first layer.
      classifier: name of the last layer, or of both.
      positional: the constructor's positional arguments, as code.
      fixed_input_size: whether images must have the network's size.
    """

    constructor: str
    arguments: dict[str, Any]
    entry_point: str
    named: dict[str, Any] | None
    first_conv: str = "patch_embed.proj"
    classifier: str | list[str] = "head"
    positional: str = ""
    fixed_input_size: bool = True


def timm_constructor(model: Any) -> TimmModel:
    """How timm makes the network whose state dict has the same names and shapes.

    Raises:
      UserError: timm has no such network, naming the attributes that it lacks.
    """
    if not isinstance(model, CaiT):
        return _regnet(model)
    return _cait(model) if model.class_token == "class_attention" else _vit(model)


def export_timm(
    path_or_dir: str | os.PathLike[str],
    model: Any,
    variables: Mapping[str, Any],
    *,
    name: str | None = None,
    label_names: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
) -> None:
    """Writes a model so that timm loads it strictly, and `load_pretrained` too.

    Args:
      path_or_dir: a `.safetensors` file, which is written alone; or a directory, which receives
        `model.safetensors`, `config.json` for timm's `local-dir:` and `hf-hub:`, and a model card.
      model: a model of this package.
      variables: their dtypes are kept.
      name: title of the model card.
      label_names: the classes in the order of the logits.
      preprocessing: as `save_pretrained` takes it.

    Raises:
      UserError: timm has no such network, the variables are not the model's, or the file cannot be written.
    """
    call = timm_constructor(model)
    section = config_section(model, label_names=label_names, preprocessing=preprocessing)
    weights = checked_state_dict(model, variables)
    path = Path(path_or_dir)
    if path.suffix == ".safetensors":
        write_safetensors(path, weights)
        return
    card = _card(name or _title(model, call), model, call, section)
    replace_files(
        path,
        {
            WEIGHTS: safetensors_writer(weights),
            CONFIG: config_writer({**_timm_config(model, call, section), SECTION: section}),
            "README.md": lambda file: file.write_text(card, encoding="utf-8"),
        },
    )


def _cait(model: Any) -> TimmModel:
    _refuse_options("Cait", model, _CAIT_OPTIONS)
    class_mlp_ratio = model.mlp_ratio if model.class_mlp_ratio is None else model.class_mlp_ratio
    if class_mlp_ratio == 0:
        raise UserError(
            f"timm's Cait has no class attention without an MLP (class_mlp_ratio 0): export a model with MLPs, "
            f"or {_as_ours()}"
        )
    usual = (model.mlp_ratio, model.class_depth, class_mlp_ratio) == (4, 2, 4)
    entry_point, named = _entry_point(model, usual=usual, otherwise="cait_xxs24_224")
    arguments = {
        **_sizes(model),
        "mlp_ratio": model.mlp_ratio,
        "depth_token_only": model.class_depth,
        "mlp_ratio_token_only": class_mlp_ratio,
        "init_values": model.layer_scale_init,
    }
    return TimmModel("timm.models.cait.Cait", arguments, entry_point, named)


def _vit(model: Any) -> TimmModel:
    _refuse_options("VisionTransformer", model, _VIT_OPTIONS)
    otherwise = f"deit_tiny{'_distilled' * model.distilled}_patch16_224"
    usual = model.class_token == "input" and not model.mean_pool
    entry_point, named = _entry_point(model, usual=usual, otherwise=otherwise)
    if model.swiglu and named is None:
        raise UserError(
            "timm has gated MLPs (swiglu) in its vit_giant_patch14_dinov2 alone: export a model without, or "
            f"{_as_ours()}"
        )
    arguments = {**_sizes(model), "mlp_ratio": model.mlp_ratio}
    if model.residual == "layerscale":
        arguments["init_values"] = model.layer_scale_init
    if model.class_token == "mean":
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    if model.mean_pool:
        arguments |= {"global_pool": "avg", "fc_norm": True}
    if not model.class_position:
        arguments["no_embed_class"] = True
    if model.registers:
        arguments["reg_tokens"] = model.registers
    if not model.distilled:
        constructor = "timm.models.vision_transformer.VisionTransformer"
        return TimmModel(constructor, arguments, entry_point, named)
    constructor = "timm.models.deit.VisionTransformerDistilled"
    both = ["head", "head_dist"]
    return TimmModel(constructor, arguments, entry_point, named, classifier=both)


def _regnet(model: Any) -> TimmModel:
    released: Any = create_model("regnety_160")
    network = {
        "w0": model.w0,
        "wa": model.wa,
        "wm": model.wm,
        "depth": model.depth,
        "group_size": model.group_width,
        "se_ratio": model.se_ratio,
        "stem_width": model.stem_width,
    }
    usual = dataclasses.replace(model, **_free_of(released)) == released
    input_and_head = {"in_chans": model.in_channels, "num_classes": model.num_classes}
    usually = {"in_chans": 3, "num_classes": 1000}
    named = {k: v for k, v in input_and_head.items() if v != usually[k]}
    return TimmModel(
        constructor="timm.models.regnet.RegNet",
        arguments={**input_and_head, **network},
        entry_point="regnety_160",
        named=named if usual else None,
        first_conv="stem.conv",
        classifier="head.fc",
        positional="timm.models.regnet.RegNetCfg()",
        fixed_input_size=False,
    )


def _free_of(released: Any) -> dict[str, Any]:
    """The attributes that timm's entry point leaves open."""
    names = ("image_size", "in_channels", "num_classes", "dtype", "param_dtype", "precision")
    return {name: getattr(released, name) for name in names}


def _input_and_head(model: Any) -> dict[str, Any]:
    height, width = model.image_size
    return {
        "img_size": height if height == width else [height, width],
        "in_chans": model.in_channels,
        "num_classes": model.num_classes,
    }


def _sizes(model: Any) -> dict[str, Any]:
    """The arguments common to timm's transformers."""
    return {
        **_input_and_head(model),
        "patch_size": model.patch_size,
        "embed_dim": model.width,
        "depth": model.depth,
        "num_heads": model.num_heads,
    }


def _entry_point(model: Any, *, usual: bool, otherwise: str) -> tuple[str, dict[str, Any] | None]:
    """`TimmModel.entry_point` and `.named` of a transformer.

    Args:
      model: the transformer.
      usual: whether everything but its sizes is as in the released models.
      otherwise: an entry point of the same class, for a model that is none of timm's.
    """
    same = [name for name in RELEASED if usual and _has_shape_of(name, model)]
    # That of this resolution first.
    same.sort(key=lambda name: RELEASED[name].image_size != model.image_size[0])
    if not same:
        return otherwise, None
    usually = {"img_size": RELEASED[same[0]].image_size, "in_chans": 3, "num_classes": 1000}
    differing = {k: v for k, v in _input_and_head(model).items() if v != usually[k]}
    return same[0].partition(".")[0], differing  # without the tag, which is of weights


def _has_shape_of(name: str, model: Any) -> bool:
    """Whether a transformer is of the same kind and size as the released `name`."""
    released = create_model(name)
    attributes = (
        "width", "depth", "num_heads", "patch_size", "mlp_ratio", "residual", "class_token", "distilled",
        "class_position", "registers", "swiglu",
    )  # fmt: skip
    return type(released) is type(model) and all(
        getattr(released, attribute, None) == getattr(model, attribute, None)
        for attribute in attributes
    )


def _refuse_options(constructor: str, model: Any, known: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuses attributes that the constructor does not have."""
    lacking = [
        f"{name} {getattr(model, name)!r}"
        for name, values in known.items()
        if getattr(model, name) not in values
    ]
    if lacking:
        raise UserError(
            f"timm's {constructor} has no {', '.join(lacking)}: export a model without, or {_as_ours()}"
        )


def _as_ours() -> str:
    return advise(Way("keep it for cait_jax, by {}", "to", "cait"), otherwise="use save_pretrained")


def _timm_config(model: Any, call: TimmModel, section: Mapping[str, Any]) -> dict[str, Any]:
    """What timm reads in `config.json`: the arguments make the network from its entry point."""
    height, width = model.image_size
    pretrained_cfg: dict[str, Any] = {
        "num_classes": model.num_classes,
        "input_size": [model.in_channels, height, width],
        "fixed_input_size": call.fixed_input_size,
        "pool_size": None,
        "interpolation": "bicubic",
        "first_conv": call.first_conv,
        "classifier": call.classifier,
        "custom_load": False,
    }
    preprocessing = section["preprocessing"]
    if preprocessing is not None:
        pretrained_cfg |= {
            "crop_pct": preprocessing["crop_pct"],
            "mean": _each_channel(preprocessing["mean"], model.in_channels),
            "std": _each_channel(preprocessing["std"], model.in_channels),
        }
    config = {
        "architecture": call.entry_point,
        "num_classes": model.num_classes,
        "model_args": call.arguments if call.named is None else call.named,
        "pretrained_cfg": pretrained_cfg,
    }
    if section["label_names"] is not None:
        config["label_names"] = section["label_names"]
    return config


def _each_channel(values: list[float], channels: int) -> list[float]:
    return values * channels if len(values) == 1 else values


def _card(title: str, model: Any, call: TimmModel, section: Mapping[str, Any]) -> str:
    """The model card, in the hub's Markdown."""
    if call.named is None:
        module = call.constructor.rpartition(".")[0]
        how = [
            f"import {module}",
            "from safetensors.torch import load_file",
            "",
            f"model = {_constructed(call)}",
            f'model.load_state_dict(load_file("{WEIGHTS}"), strict=True)',
        ]
    else:
        file = _call("timm.create_model", call.entry_point, **call.named, checkpoint_path=WEIGHTS)
        how = [
            "import timm",
            "",
            'model = timm.create_model("local-dir:DIRECTORY", pretrained=True)',
            f"# or, from the file of weights alone: model = {file}",
        ]
    lines = [
        "---",
        "library_name: timm",
        "tags: [image-classification, timm]",
        "---",
        f"# {title}",
        "",
        f"A {type(model).__name__} written by cait_jax, as `{_constructed(call)}`.",
        "",
        f"Images: {_images(model, section['preprocessing'])}.",
        "",
        "```python",
        *how,
        "model.eval()",
        "```",
        "",
        "In JAX:",
        "",
        "```python",
        "from cait_jax.weights.pretrained import load_pretrained",
        "",
        'model, variables = load_pretrained("DIRECTORY")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _title(model: Any, call: TimmModel) -> str:
    return type(model).__name__ if call.named is None else call.entry_point


def _images(model: Any, preprocessing: Mapping[str, Any] | None) -> str:
    height, width = model.image_size
    size = f"{height} by {width} pixels, {model.in_channels} channel(s)"
    if preprocessing is None:
        return f"{size}; how they were normalised is not recorded"
    return (
        f"{size}, resized (bicubic, antialiased) to cover that over {preprocessing['crop_pct']}, then "
        f"cropped in the middle; mean {tuple(preprocessing['mean'])} and std "
        f"{tuple(preprocessing['std'])} on a scale from 0 to 1"
    )


def _constructed(call: TimmModel) -> str:
    written = _call(call.constructor, **call.arguments)
    return written.replace("(", f"({call.positional}, ", 1) if call.positional else written


def _call(function: str, *values: Any, **arguments: Any) -> str:
    parts = [repr(value) for value in values]
    parts += [
        f"{key}={tuple(value) if isinstance(value, list) else value!r}"
        for key, value in arguments.items()
    ]
    return f"{function}({', '.join(parts)})"
