"""The page: one HTML file with its styles, its scripts, photographs and quantised arrays."""

import base64
import dataclasses
import hashlib
import html
import importlib.resources
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt8

from cait_jax.explain.attention import patch_grid, special_names, special_tokens
from cait_jax.explain.report.look import CLASS_FREE, class_specials, map_kinds
from cait_jax.explain.report.quantise import LEVELS, Quantised, encode, quantise
from cait_jax.files import to_json
from cait_jax.models.cait import CaiT

SMALL_LEVELS = 64  # of self-attention in the small form
SCRIPTS = ("maps.js", "draw.js", "panel.js", "report.js")
_LOSSLESS_SIDE = 128  # pixels, up to which a photograph is kept as PNG
_JPEG_QUALITY = 90


@dataclasses.dataclass(frozen=True)
class View:
    """What one network makes of one image.

    Attributes:
      image, model: numbers among those of the page.
      photograph: what the network sees, before normalisation.
      found: the image's arrays of `look`, without the batch axis.
    """

    image: int
    model: int
    photograph: UInt8[np.ndarray, "height width channels"]
    found: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Seer:
    """A network of the page: `name` as shown, and a word for each class."""

    name: str
    model: CaiT
    class_words: Sequence[str]


def build_page(
    models: Sequence[Seer],
    images: Sequence[str],
    views: Sequence[View],
    *,
    head_means: bool = False,
) -> str:
    """The whole HTML document.

    Args:
      models: the networks.
      images: the names of the images.
      views: one for each pair, in any order.
      head_means: whether self-attention is of head means alone, in `SMALL_LEVELS` levels.

    Raises:
      UserError: an array has values that are not finite.
    """
    blobs: dict[str, str] = {}
    manifest = {
        "models": [_network(seer, head_means) for seer in models],
        "images": list(images),
        "headMeans": head_means,
        "views": [_view(view, models[view.model], blobs, head_means) for view in views],
    }
    data = _script("application/json", "manifest", to_json(manifest))
    data += "".join(_script("application/octet-stream", name, text) for name, text in blobs.items())
    style = _source("report.css")
    script = "\n".join(['"use strict";', *map(_source, SCRIPTS)])
    title = f"{', '.join(seer.name for seer in models)}: {', '.join(images[:3])}"
    parts = {
        "{{policy}}": _policy(style, script),
        "{{title}}": html.escape(title),
        "/*{{style}}*/": style,
        "<!--{{data}}-->": data,
        "/*{{script}}*/": script,
    }
    marks = "|".join(map(re.escape, parts))
    return re.sub(marks, lambda mark: parts[mark[0]], _source("report.html"))


def _network(seer: Seer, head_means: bool) -> dict[str, Any]:
    model = seer.model
    rows, columns = patch_grid(model)
    return {
        "name": seer.name,
        "rows": rows,
        "columns": columns,
        "heads": 1 if head_means else model.num_heads,
        "allHeads": model.num_heads,
        "kinds": list(map_kinds(model)),
        "specials": list(special_tokens(model)),
        "specialNames": [name if " " in name else f"{name} token" for name in special_names(model)],
        "classSpecials": class_specials(model),
        "classAttention": bool(model.class_depth),
        "imageSize": list(model.image_size),
    }


def _view(view: View, seer: Seer, blobs: dict[str, str], head_means: bool) -> dict[str, Any]:
    found, name = view.found, f"view-{view.image}-{view.model}"
    levels = SMALL_LEVELS if head_means else LEVELS
    kept = found.get("self", {})
    for kind, layers in kept.items():
        blobs[f"{name}-{kind}"] = encode([quantise(maps, levels) for maps in layers])
    small: list[Quantised] = [
        quantise(rows) for kind in map_kinds(seer.model) for rows in found["class_rows"][kind]
    ]
    maps = np.asarray(found["maps"])
    small.append(quantise(maps.reshape(maps.shape[0], -1)))
    blobs[name] = encode(small)

    chosen = list(
        dict.fromkeys(found["classes"].tolist())
    )  # a class asked for may be at the top too
    places = [found["classes"].tolist().index(index) for index in chosen]
    classes = [
        {
            "index": index,
            "word": seer.class_words[index],
            "probability": _number(found["probabilities"][place]),
            "map": len(CLASS_FREE) + place,
            "curves": _curves(found, place),
        }
        for index, place in zip(chosen, places, strict=True)
    ]
    return {
        "image": view.image,
        "model": view.model,
        "blob": name,
        "selfAttention": bool(kept),
        "photograph": _photograph(view.photograph),
        "maps": int(maps.shape[0]),
        "classes": classes,
    }


def _curves(found: Mapping[str, Any], place: int) -> dict[str, dict[str, list[float]]]:
    """The curves of one class: of each map that knows no class, and of its own relevance."""
    rows = {name: row for row, name in enumerate(CLASS_FREE)}
    rows["relevance"] = len(CLASS_FREE) + place
    return {
        name: {
            curve: [_number(value) for value in found[curve][row][place]]
            for curve in ("deletion", "insertion")
        }
        for name, row in rows.items()
    }


def _number(value: Any) -> float:
    """A float32 as the shortest decimal that gives it back."""
    return float(str(np.float32(value)))


def _photograph(pixels: UInt8[np.ndarray, "height width channels"]) -> str:
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    file, kind = io.BytesIO(), "png" if max(pixels.shape[:2]) <= _LOSSLESS_SIDE else "jpeg"
    image.save(file, kind, **({"quality": _JPEG_QUALITY} if kind == "jpeg" else {}))
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode('ascii')}"


def _script(kind: str, name: str, text: str) -> str:
    # JSON and base64 hold no `<` that is not escaped, so the element cannot end early.
    return f'<script type="{kind}" id="{name}">{text.replace("<", chr(92) + "u003c")}</script>\n'


def _policy(style: str, script: str) -> str:
    """The content security policy: nothing but this style, this script and images in the file itself."""

    def digest(text: str) -> str:
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; img-src data:; style-src {digest(style)}; script-src {digest(script)}; "
        "base-uri 'none'; form-action 'none'"
    )


def _source(name: str) -> str:
    return (
        importlib.resources.files("cait_jax.explain.report")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )
