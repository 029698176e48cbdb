"""What a model costs, counted from its shapes without running it."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from cait_jax.models.zoo import Network


def parameter_count(model: Network) -> int:
    """Trainable numbers of a model; the running statistics of batch norms are not among them."""
    variables = jax.eval_shape(model.init, jax.random.key(0), _one_image(model))
    return sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))


def macs(model: Network) -> int:
    """Multiply-accumulates of one image's forward pass.

    Every matrix product and convolution of the traced program counts with its exact shapes, head mixing
    among them; sums, norms, softmax and activations do not count, as is usual.

    Args:
      model: a model.

    Returns:
      The number for one image of the model's `image_size`; in GMACs, over 1e9.
    """
    image = _one_image(model)
    variables = jax.eval_shape(model.init, jax.random.key(0), image)
    return _count(jax.make_jaxpr(model.apply)(variables, image).jaxpr)


def _one_image(model: Network) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)


def _count(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        output = math.prod(equation.outvars[0].aval.shape) if equation.outvars else 0
        shapes = [v.aval.shape for v in equation.invars if hasattr(v.aval, "shape")]
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += output * math.prod(shapes[0][axis] for axis in contracted)
        elif equation.primitive.name == "conv_general_dilated":
            out_axis = equation.params["dimension_numbers"].rhs_spec[0]
            kernel = shapes[1]
            total += output * math.prod(kernel) // kernel[out_axis]
        else:
            times = equation.params.get("length", 1) if equation.primitive.name == "scan" else 1
            total += times * sum(_count(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The programs that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
