"""The second branch of every block."""

import functools

import jax
from flax import linen as nn

from cait_jax.models.layers import Dropout, ExampleIds, Tokens
from cait_jax.models.residual import Residual

# Going back it is computed anew from what went in: what its derivative needs is four arrays as wide.
gelu = jax.checkpoint(functools.partial(nn.gelu, approximate=False), prevent_cse=False)


class Mlp(nn.Module):
    """Two linear layers with an exact (erf) GELU between them."""

    hidden: int
    dropout: float = 0.0
    residual: Residual = Residual()

    @nn.compact
    def __call__(self, x: Tokens, example_ids: ExampleIds = None) -> Tokens:
        """Maps the last axis of `x` through `hidden` channels and back."""
        width = x.shape[-1]
        x = self.residual.linear(x, self.hidden, "fc1")
        x = gelu(x)
        x = Dropout(self.dropout, name="drop1")(x, example_ids)
        x = self.residual.linear(x, width, "fc2")
        return Dropout(self.dropout, name="drop2")(x, example_ids)
