"""Low-rank adaptation (Hu et al., arXiv 2106.09685) of a network's parameters.

A frozen matrix W (in, out) acts as `W + alpha / rank * A @ B`, of which A (in, rank) and B (rank, out) learn.
Adapters have the paths of their layers in `params`: `blocks/attn/qkv/lora_a` beside `blocks/attn/qkv/kernel`, and
in stacked blocks the same leading depth axis.
"""

import contextlib
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array

# Of the blocks. Queries, keys and values are one matrix in self-attention and have one A.
LAYERS = ("qkv", "q", "k", "v", "proj", "fc1", "fc2")
A, B = "lora_a", "lora_b"

Params = Mapping[str, Any]


def init(key: Array, params: Params, rank: int) -> dict[str, Any]:
    """Adapters of all `LAYERS` of the blocks in `params`: A from N(0, 1 / in), B 0, in the kernel's dtype."""
    blocks = {name: layers for name, layers in params.items() if name.startswith("blocks")}
    return _init(key, blocks, rank)


def _init(key: Array, layers: Params, rank: int) -> dict[str, Any]:
    adapters: dict[str, Any] = {}
    for number, (name, layer) in enumerate(sorted(layers.items())):
        if not isinstance(layer, Mapping):
            continue
        own = jax.random.fold_in(key, number)
        if name in LAYERS:
            kernel = layer["kernel"]
            *depth, rows, columns = kernel.shape
            a = rows**-0.5 * jax.random.normal(own, (*depth, rows, rank), kernel.dtype)
            adapters[name] = {A: a, B: jnp.zeros((*depth, rank, columns), kernel.dtype)}
        elif found := _init(own, layer, rank):
            adapters[name] = found
    return adapters


def join(params: Params, learnt: Params) -> dict[str, Any]:
    """One tree of both, in which `learnt`, adapters and whole layers such as a head, comes first."""
    joined = dict(params)
    for name, value in learnt.items():
        joined[name] = join(params.get(name, {}), value) if isinstance(value, Mapping) else value
    return joined


def merge(params: Params, alpha: float) -> dict[str, Any]:
    """Plain parameters that compute what joined ones do: kernels become `W + alpha / rank * A @ B`."""
    merged = {
        name: merge(value, alpha) if isinstance(value, Mapping) else value
        for name, value in params.items()
        if name not in (A, B)
    }
    if A in params:
        a, b, kernel = (jnp.asarray(params[name]) for name in (A, B, "kernel"))
        wide = jnp.promote_types(kernel.dtype, jnp.float32)
        product = jnp.matmul(a, b, precision="highest", preferred_element_type=wide)
        merged["kernel"] = (kernel + alpha / a.shape[-1] * product).astype(kernel.dtype)
    return merged


def adapted(alpha: float) -> contextlib.AbstractContextManager[Any]:
    """Has networks that are applied inside add `alpha / rank * x @ A @ B` to each layer with adapters.

    No matrix of the size of W is made, nor its gradient.
    """

    def adapt(call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        is_linear = isinstance(layer, nn.Dense) and context.method_name == "__call__"
        if is_linear and layer.has_variable("params", A):
            factors: dict[str, Array] = {
                name: layer.get_variable("params", name) for name in (A, B)
            }
            # Read at the call only, with what other interceptors make of the layer's input.
            object.__setattr__(
                layer, "dot_general", functools.partial(_product, factors[A], factors[B], alpha)
            )
        return call(*args, **kwargs)

    return nn.intercept_methods(adapt)


def _product(
    a: Array, b: Array, alpha: float, x: Array, kernel: Array, *given: Any, **options: Any
) -> Array:
    a, b = a.astype(x.dtype), b.astype(x.dtype)
    low = jax.lax.dot_general(x, a, *given, **options)
    high: Array = jax.lax.dot_general(low, b, *given, **options)
    return jax.lax.dot_general(x, kernel, *given, **options) + alpha / a.shape[-1] * high
