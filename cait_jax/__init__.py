"""CaiT (Class-Attention in Image Transformers) for JAX.

model, variables = cait_jax.load_pretrained("cait_xs24_384")
images = cait_jax.preprocessing("cait_xs24_384")(["dog.jpg"])
logits = model.apply(variables, images)
"""

from cait_jax.data.preprocess import Preprocessing
from cait_jax.errors import UserError
from cait_jax.models.inspect import forward_intermediates
from cait_jax.models.nnx_bridge import to_nnx
from cait_jax.weights.pretrained import (
    create_model,
    list_models,
    load_pretrained,
    load_settings,
    preprocessing,
    save_pretrained,
)
from cait_jax.weights.timm_export import export_timm

__version__ = "0.1.0"
__all__ = [
    "Preprocessing",
    "UserError",
    "create_model",
    "export_timm",
    "forward_intermediates",
    "list_models",
    "load_pretrained",
    "load_settings",
    "preprocessing",
    "save_pretrained",
    "to_nnx",
]
