"""CaiT (Class-Attention in Image Transformers) for JAX.

model = cait_jax.create_model("cait_xs24", image_size=224)
variables = model.init(key, images)
logits = model.apply(variables, images)
"""

from cait_jax.errors import UserError
from cait_jax.models.zoo import create_model, forward_intermediates, list_models

__version__ = "0.1.0"
__all__ = ["UserError", "create_model", "forward_intermediates", "list_models"]
