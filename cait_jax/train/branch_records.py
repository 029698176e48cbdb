"""LayerScale and norms of residual branches in the course of training, in WORKDIR/inspect/STEP.npz."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from cait_jax.augment.pipeline import normalise
from cait_jax.errors import StorageError, UserError, setting
from cait_jax.explain.depth import branch_ratio
from cait_jax.files import atomic_replace
from cait_jax.models.cait import CaiT
from cait_jax.sharding import replicated
from cait_jax.train.setup import Trainer

IMAGES = 8  # the first of the global batch, before augmentation


def branch_recorder(trainer: Trainer, workdir: Path) -> Callable[[int, Any, Any], None]:
    """A function of a step, its parameters and its batch on the mesh that writes a record.

    Arrays: `branch_ratio` (blocks, 2), as `cait_jax.explain.depth.branch_ratio`; with LayerScale `layer_scale_1`
    and `layer_scale_2` (blocks, width). A record depends on the step alone: a resumed run writes the same again.

    Raises:
      UserError: the network is no transformer.
      StorageError: by the function: a record cannot be written.
    """
    data = trainer.config.data
    if not isinstance(trainer.model, CaiT):
        raise UserError(
            f"{setting('config.report.inspect_every')} is for transformers, and {trainer.config.model.name} is "
            "none: leave it at 0"
        )
    model: CaiT = trainer.model

    def record(params: Any, images: Array) -> dict[str, Array]:
        images = normalise(images[:IMAGES], data.mean, data.std)
        found = {"branch_ratio": branch_ratio(model, {"params": params}, images)}
        return found | layer_scales(model, params)

    jitted = jax.jit(record, out_shardings=replicated(trainer.mesh))

    def write(step: int, params: Any, batch: Any) -> None:
        arrays = jitted(params, batch["image"])
        if jax.process_index() != 0:
            return
        path = workdir / "inspect" / f"{step:08d}.npz"
        try:
            path.parent.mkdir(exist_ok=True)
            with atomic_replace(path) as temporary, temporary.open("wb") as file:
                np.savez(file, **jax.device_get(arrays))
        except OSError as error:
            raise StorageError(
                f"{path} cannot be written: {error.strerror}; free some space or set report.inspect_every to 0"
            ) from error

    return write


def layer_scales(model: CaiT, params: Any) -> dict[str, Float[Array, "blocks width"]]:
    """The gammas of both branches of every block, class attention last; empty without LayerScale.

    A block without an MLP has NaN.
    """
    if model.residual != "layerscale":
        return {}
    stacked = "blocks" in params
    blocks = [] if stacked else [params[f"blocks_{i}"] for i in range(model.depth)]
    blocks += [params[f"blocks_token_only_{i}"] for i in range(model.class_depth or 0)]
    none = {"gamma": jnp.full((model.width,), jnp.nan)}

    def of(name: str) -> Array:
        each = [block.get(name, none)["gamma"] for block in blocks]
        first = [params["blocks"][name]["gamma"]] if stacked else []
        return jnp.concatenate([*first, *([jnp.stack(each)] if each else [])])

    return {name: of(name) for name in ("layer_scale_1", "layer_scale_2")}
