"""Reports of small networks, of arrays that are drawn at random in the shapes of `look`."""

import functools

import jax
import numpy as np

from cait_jax import create_model
from cait_jax.explain.attention import patch_grid, special_tokens
from cait_jax.explain.report.look import CLASS_FREE, class_specials, map_kinds
from cait_jax.explain.report.page import Seer, View, build_page

SIZES = {"width": 16, "depth": 3, "num_heads": 2, "image_size": 64, "num_classes": 7}
NETWORKS = {
    "cait": ("cait_xxs24", {}),
    "distilled": ("deit_tiny_distilled", {"depth": 2}),
    "late": ("vit_tiny", {"class_token": 1, "stacked": False, "patch_size": 32}),
    "headless": ("vit_tiny", {"num_classes": 0, "patch_size": 32}),
}
WORDS = ("tench", "<b>finch</b>", "tea, pot", 'a "crane"', "</script>", "cat", "dog")
CLASSES = (5, 0, 3, 0, 6)  # three most probable ones, and two asked for, of which one is among them
POINTS = 5


@functools.cache
def network(name):
    base, attributes = NETWORKS[name]
    return create_model(base, **{**SIZES, **attributes})


@functools.cache
def found(name, head_means=False, with_self_attention=True):
    """The arrays of two images, as `look` gives them."""
    model, rng = network(name), np.random.default_rng(len(name))
    (rows, columns), heads = patch_grid(model), 1 if head_means else model.num_heads
    patches = rows * columns

    def maps(kind, *shape):
        if kind == "weights":
            return rng.dirichlet(np.full(shape[-1], 0.3), shape[:-1]).astype(np.float32)
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    kinds, k = map_kinds(model), len(CLASSES) if model.num_classes else 0
    arrays = {
        "classes": np.tile(np.array(CLASSES[:k], np.int32), (2, 1)),
        "probabilities": rng.random((2, k)).astype(np.float32),
        "maps": maps("maps", 2, len(CLASS_FREE) + k, rows, columns),
        "deletion": rng.random((2, len(CLASS_FREE) + k, k, POINTS)).astype(np.float32),
        "insertion": rng.random((2, len(CLASS_FREE) + k, k, POINTS)).astype(np.float32),
        "class_rows": {
            kind: [maps(kind, 2, heads, special + patches) for special in class_specials(model)]
            for kind in kinds
        },
    }
    if with_self_attention:
        tokens = [special + patches for special in special_tokens(model)]
        arrays["self"] = {kind: [maps(kind, 2, heads, n, n) for n in tokens] for kind in kinds}
    return arrays


def page_of(*names, number=1, head_means=False, kept=None):
    """The page of networks by name, with the first `number` images; self-attention of the first `kept`."""
    pixels = np.random.default_rng(4).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    views = []
    for model, name in enumerate(names):
        for image in range(number):
            arrays = found(name, head_means, kept is None or image < kept)
            arrays = jax.tree.map(lambda array, image=image: array[image], arrays)
            views.append(View(image, model, pixels[image], arrays))
    seers = [Seer(name, network(name), WORDS) for name in names]
    return build_page(seers, ["one.jpg", "<i>two</i>.jpg"][:number], views, head_means=head_means)
