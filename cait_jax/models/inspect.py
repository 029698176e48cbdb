"""Looking into a network: attention maps and features, its shapes, and what it costs."""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from cait_jax.models.cait import CaiT
from cait_jax.models.layers import Images
from cait_jax.models.zoo import Network


def forward_intermediates(
    model: Network, variables: Mapping[str, Any], images: Images
) -> tuple[Float[Array, "batch outputs"], dict[str, Any]]:
    """Applies the model to normalised images once, and returns intermediates beside the output.

    Returns:
      The output of `model.apply(variables, images)`, and a dict of
        `blocks`: `features` (depth, batch, tokens, width) and, of self-attention, `logits`, `softmax` and,
          with talking heads, `mixed_logits`, `mixed_softmax` (depth, batch, heads, tokens, tokens); a list
          of such dicts without the leading axis where a token joins on the way;
        `blocks_token_only`, with class attention: `features` (class_depth, batch, 1, width), `logits` and
          `softmax` (class_depth, batch, heads, 1, 1 + patches), the class token's own column first;
        `stages`, of RegNetY: a list of the stages' outputs (batch, height, width, channels);
        `features`: (batch, width), what the head reads;
        `logits_class` and `logits_distillation`, of a distilled network.
    """
    output, mutated = model.apply(variables, images, mutable=["intermediates"])
    if isinstance(model, CaiT):
        return output, by_stage(model, mutated["intermediates"])
    tree = dict(mutated["intermediates"])
    stages = [tree.pop(name)["features"] for name in sorted(tree) if name != "features"]
    return output, {"stages": stages, **tree}


def by_stage(model: CaiT, collection: Mapping[str, Any]) -> dict[str, Any]:
    """A collection in which blocks recorded arrays, in the structure of `forward_intermediates`."""
    tree = dict(collection)
    if "blocks" in tree:
        tree["blocks"] = _flatten(tree["blocks"])
    else:
        blocks = [_flatten(tree.pop(f"blocks_{i}")) for i in range(model.depth)]
        tree["blocks"] = blocks if isinstance(model.class_token, int) else _stack(blocks)
    token_only = [
        _flatten(tree.pop(f"blocks_token_only_{i}")) for i in range(model.class_depth or 0)
    ]
    if token_only:
        tree["blocks_token_only"] = _stack(token_only)
    return tree


def _stack(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _flatten(block: Mapping[str, Any]) -> dict[str, Array]:
    return {**{name: value for name, value in block.items() if name == "features"}, **block["attn"]}


@functools.cache
def abstract_variables(model: Network) -> dict[str, Any]:
    """Shapes and dtypes of a model's variables, as `jax.ShapeDtypeStruct`s."""
    # The key is made inside: outside, making it would be compiled.
    variables: dict[str, Any] = jax.eval_shape(
        lambda image: model.init(jax.random.key(0), image), _one_image(model)
    )
    return variables


def parameter_count(model: Network) -> int:
    """Trainable numbers of a model; the running statistics of batch norms are not among them."""
    return sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(model)["params"]))


@functools.cache
def macs(model: Network) -> int:
    """Multiply-accumulates of one image's forward pass.

    Every matmul and convolution of the traced program counts with its exact shapes, head mixing among them; sums,
    norms, softmax and activations do not, as is usual.
    """
    return macs_of(jax.make_jaxpr(model.apply)(abstract_variables(model), _one_image(model)).jaxpr)


def residual_bytes(model: Network, batch_size: int) -> int:
    """Bytes that a training step on `batch_size` images keeps for the backward pass, in plain JAX.

    A compiler keeps less where it rematerialises, and more where it copies.
    """
    images = jax.ShapeDtypeStruct((batch_size, *model.image_size, model.in_channels), jnp.float32)
    params = abstract_variables(model)["params"]

    def backward(params: Any, images: Any) -> Any:
        def forward(params: Any) -> Any:
            return model.apply(
                {"params": params},
                images,
                train=True,
                example_ids=jnp.arange(batch_size),
                rngs={"dropout": jax.random.key(0), "drop_path": jax.random.key(0)},
            )

        return jax.vjp(forward, params)[1]

    kept = jax.tree.leaves(jax.eval_shape(backward, params, images))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in kept)


def _one_image(model: Network) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, *model.image_size, model.in_channels), jnp.float32)


def macs_of(jaxpr: Any) -> int:
    """Multiply-accumulates of a jaxpr on all devices; the body of a scan counts once an iteration."""
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
        elif equation.primitive.name == "pallas_call":  # a kernel's own estimate
            total += equation.params["cost_estimate"].flops // 2
        else:
            times = 1
            if equation.primitive.name == "scan":
                times = equation.params["length"]
            elif equation.primitive.name == "shard_map":  # what each device does
                times = equation.params["mesh"].size
            total += times * sum(macs_of(inner) for inner in _inner(equation.params))
    return total


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The jaxprs that an equation calls."""
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item
