"""The paper's comparisons: residual schemes (its table 1), places of the class token (table 3), talking heads."""

from collections.abc import Mapping
from typing import Any

from studies.runs import Arm, Job, Study, base_config, run


def arm(**model: Any) -> Arm:
    """A network that differs from the others in some keys of `model`."""

    def train(job: Job) -> dict[str, Any] | None:
        config = base_config(job)
        config.model.update(model)
        return run(config, job)

    return Arm(train)


def residual_arm(scheme: str, depth: int) -> Arm:
    """LayerScale, and one scalar a branch, start by the paper's rule (section 2)."""
    options: Mapping[str, Any] = {}
    if scheme in ("layerscale", "scalar"):
        options = {"layer_scale_init": 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6}
    return arm(depth=depth, residual=scheme, **options)


RESIDUAL = Study(
    "does LayerScale lead as depth grows?",
    {
        f"{scheme} {depth}": residual_arm(scheme, depth)
        for depth in (12, 24, 36)
        for scheme in ("plain", "rezero", "fixup", "t_fixup", "scalar", "layerscale")
    },
)

# Ten blocks each.
CLASS_TOKEN = Study(
    "where should the class token read the patches?",
    {
        "mean": arm(depth=10, class_token="mean"),
        "input": arm(depth=10, class_token="input"),
        "block 4": arm(depth=10, class_token=4),
        "block 8": arm(depth=10, class_token=8),
        "class attention 1": arm(depth=9, class_depth=1),
        "class attention 2": arm(depth=8, class_depth=2),
        "class attention 4": arm(depth=6, class_depth=4),
    },
)

HEADS = Study(
    "what are talking heads worth, and how many?",
    {
        f"{heads} {'talking ' * talks}heads": arm(depth=8, num_heads=heads, talking_heads=talks)
        for heads in (2, 4, 8)
        for talks in (False, True)
    },
)
