"""Supervised training of adapters (LoRA, Hu et al., arXiv 2106.09685) and head, while all else is frozen."""

import functools
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array
from ml_collections import ConfigDict

from cait_jax.errors import UserError, setting
from cait_jax.models import lora
from cait_jax.train.objectives.supervised import Supervised
from cait_jax.train.step import Aux, Batch, Evaluate, Keys, Params

_HEADS = ("head", "head_dist")
_merge = functools.partial(jax.jit, static_argnames="alpha")(lora.merge)


@struct.dataclass
class Lora:
    """The objective. Parameters are adapters and heads; what is carried, `base`, are the others, as they start.

    Attributes:
      supervised: the loss, of whose network the parameters are adapted.
      rank: of the adapters.
      alpha: their products are scaled by `alpha / rank`.
    """

    supervised: Supervised
    rank: int = struct.field(pytree_node=False)
    alpha: float = struct.field(pytree_node=False)

    rngs: ClassVar[tuple[str, ...]] = Supervised.rngs

    @property
    def model(self) -> Any:
        """The network without adapters."""
        return self.supervised.model

    def init(self, key: Array, images: Array, params: Params = None) -> tuple[Params, Any]:
        """Adapters that add nothing yet, with the heads; and the base."""
        params, _ = self.supervised.init(key, images, params)
        heads = {name: layer for name, layer in params.items() if name in _HEADS}
        base = {name: layer for name, layer in params.items() if name not in _HEADS}
        return {**lora.init(jax.random.fold_in(key, 1), base, self.rank), **heads}, {"base": base}

    def prepare(self, batch: Batch, keys: Keys) -> Batch:
        """As in supervised training."""
        return self.supervised.prepare(batch, keys)

    def loss(
        self, params: Params, carried: Any, batch: Batch, keys: Keys, step: Array
    ) -> tuple[Array, Aux]:
        """Loss and accuracy of supervised training."""
        with lora.adapted(self.alpha):
            joined = lora.join(carried["base"], params)
            return self.supervised.loss(joined, {}, batch, keys, step)

    def update(self, carried: Any, params: Params, aux: Aux, step: Array) -> Any:
        """The base stays."""
        del params, aux, step
        return carried

    def evaluated(self, named: Mapping[str, Params], carried: Any) -> Mapping[str, Params]:
        """The merged parameters of the network."""
        return {
            name: _merge(lora.join(carried["base"], params), alpha=self.alpha)
            for name, params in named.items()
        }

    def evaluator(self, mesh: Mesh) -> Evaluate:
        """As in supervised training."""
        return self.supervised.evaluator(mesh)


def from_config(config: ConfigDict, supervised: Supervised) -> Lora:
    """The objective of a config with `lora.rank`, around that without.

    Raises:
      UserError: for a rank above the network's width.
    """
    rank, width = config.lora.rank, supervised.model.width
    if rank > width:
        raise UserError(
            f"{setting('config.lora.rank', rank)} is above the network's width, {width}, where adapters save "
            "nothing: give a small one, such as 8"
        )
    return Lora(supervised, rank, config.lora.alpha)
