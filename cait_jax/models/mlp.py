"""The second branch of every block."""

import functools

import jax
from flax import linen as nn

from cait_jax.models.layers import PRODUCT, Dropout, ExampleIds, Tokens
from cait_jax.models.residual import Residual

_KEPT = jax.checkpoint_policies.save_only_these_names(PRODUCT)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them.

    Going back GELU is computed anew from what went in: its derivative needs four arrays as wide.
    """

    hidden: int
    dropout: float = 0.0
    residual: Residual = Residual()

    @functools.partial(nn.remat, policy=_KEPT)
    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Maps the last axis of `x` through `hidden` channels and back."""
        width = x.shape[-1]
        x = self.residual.linear(x, self.hidden, "fc1")
        x = nn.gelu(x, approximate=False)
        x = Dropout(self.dropout, name="drop1")(x, example_ids)
        x = self.residual.linear(x, width, "fc2")
        return Dropout(self.dropout, name="drop2")(x, example_ids)
