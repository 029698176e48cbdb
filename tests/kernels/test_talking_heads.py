"""Every implementation of talking-heads attention against float64, its gradients, and what it writes to memory."""

import functools
import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import export
from jax.sharding import NamedSharding, PartitionSpec
from marks import slow, slow_unless

from cait_jax import create_model, list_models
from cait_jax.kernels import DEFAULT_ATTENTION, IMPLEMENTATIONS, talking_heads_attention
from cait_jax.kernels import tpu as tpu_kernels
from cait_jax.sharding import constrain_batch, make_mesh

KERNEL = "pallas_tpu_interpreted"  # the GPUs' is interpreted in test_gpu_kernel.py
NAMES = ("q", "k", "v", "pre_weight", "pre_bias", "post_weight", "post_bias")
# Tokens and heads of the named models, and what fits no tile.
ZOO = sorted(
    {
        (math.prod(model.image_size) // model.patch_size**2, model.num_heads)
        for model in map(create_model, list_models("cait_*"))
        if model.patch_size == 16
    }
)
RAGGED = [(1, 2), (17, 5), (37, 3)]


def arguments(tokens, heads, *, batch=1, dim=48, dtype=np.float32, seed=0):
    """Drawn so that softmaxes are neither flat nor pointed."""
    draw = np.random.default_rng(seed).normal
    sizes = [(batch, tokens, heads, dim)] * 3 + [(heads, heads), (heads,)] * 2
    scales = [dim**-0.5, 1, 1, heads**-0.5, 1, heads**-0.5, 0.1]
    return [
        jnp.asarray(draw(size=size) * scale, dtype)
        for size, scale in zip(sizes, scales, strict=True)
    ]


def reference(q, k, v, pre_weight, pre_bias, post_weight, post_bias):
    """The definition, in float64 and NumPy alone."""
    q, k, v, pre_weight, pre_bias, post_weight, post_bias = (
        np.asarray(x, np.float64) for x in (q, k, v, pre_weight, pre_bias, post_weight, post_bias)
    )
    logits = np.einsum("bqhc,bkhc,hg->bgqk", q, k, pre_weight, optimize=True)
    logits += pre_bias[:, None, None]
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    maps = powers / powers.sum(-1, keepdims=True)
    maps = np.einsum("bgqk,gf->bfqk", maps, post_weight) + post_bias[:, None, None]
    return np.einsum("bfqk,bkfc->bqfc", maps, v)


def attention(implementation, precision="highest"):
    return functools.partial(
        talking_heads_attention, implementation=implementation, precision=precision
    )


def distance(found, expected):
    """Largest difference over the largest number that is expected."""
    found, expected = (np.asarray(x, np.float64) for x in (found, expected))
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize(
    ("tokens", "heads"),
    slow_unless(lambda tokens, heads: tokens < 200 and heads < 16, ZOO + RAGGED),
)
@pytest.mark.parametrize(
    "implementation", ["xla", "xla_remat", "xla_by_image", "pallas_tpu_interpreted"]
)
def test_the_output_is_that_of_the_definition(implementation, tokens, heads):
    given = arguments(tokens, heads)
    found = jax.jit(attention(implementation))(*given)
    assert distance(found, reference(*given)) < 3e-6


@pytest.mark.parametrize("implementation", ["xla", "xla_by_image", KERNEL])
def test_in_bfloat16_the_maps_are_still_float32(implementation):
    given = arguments(50, 4, batch=2, dtype=jnp.bfloat16)
    found = jax.jit(attention(implementation, None))(*given)
    assert found.dtype == jnp.bfloat16
    assert distance(found, reference(*given)) < 6e-3


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "heads"), [(196, 4), (576, 8), *RAGGED])
def test_a_gpu_computes_the_definition(tokens, heads):
    given = arguments(tokens, heads, batch=2, dtype=jnp.bfloat16)
    found = jax.jit(attention("pallas_gpu", None))(*given)
    assert distance(found, reference(*given)) < 6e-3


def gradients(implementation, given, cotangent, precision="highest"):
    def back(*given):
        return jax.vjp(attention(implementation, precision), *given)[1](cotangent)

    return jax.jit(back)(*given)


@pytest.mark.parametrize(
    ("tokens", "heads"), slow_unless(lambda tokens, heads: tokens == 17, [(196, 4), *RAGGED])
)
@pytest.mark.parametrize("implementation", ["xla_remat", "xla_by_image", KERNEL])
def test_every_gradient_is_that_of_the_definition(implementation, tokens, heads):
    given = arguments(tokens, heads, batch=2)
    cotangent = arguments(tokens, heads, batch=2, seed=1)[1]
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in given]
        expected = gradients("xla", wide, jnp.asarray(cotangent, jnp.float64))
    found = gradients(implementation, given, cotangent)
    for name, one, other in zip(NAMES, found, expected, strict=True):
        if name == "pre_bias":
            assert np.abs(one).max() < 1e-4
        elif tokens > 1 or name in ("v", "post_weight", "post_bias"):
            assert distance(one, other) < 1e-5, name


def test_gradients_are_those_of_differences():
    """Along a direction of all seven inputs at once, in float64 differences of the definition."""
    given, direction = arguments(20, 3, dim=16), arguments(20, 3, dim=16, seed=2)
    cotangent = arguments(20, 3, dim=16, seed=1)[1]
    found = gradients(KERNEL, given, cotangent)
    slope = sum(float(np.vdot(one, np.asarray(d))) for one, d in zip(found, direction, strict=True))

    def value(step):
        moved = [
            np.asarray(x, np.float64) + step * np.asarray(d, np.float64)
            for x, d in zip(given, direction, strict=True)
        ]
        return float(np.vdot(reference(*moved), np.asarray(cotangent, np.float64)))

    assert slope == pytest.approx((value(1e-5) - value(-1e-5)) / 2e-5, rel=1e-4)


def test_padding_of_a_tile_adds_nothing(monkeypatch):
    """Several tiles of queries, of which the last is not full."""
    monkeypatch.setattr(tpu_kernels, "TILE_BYTES", 4 * 3 * 128 * 4 * 16)
    assert tpu_kernels.tiling(50, 3, 16, arrays=4) == tpu_kernels.Tiling(16, 4, 50, 3, 16)
    given, cotangent = arguments(50, 3, dim=16), arguments(50, 3, dim=16, seed=1)[1]
    found, expected = (gradients(name, given, cotangent) for name in (KERNEL, "xla"))
    for name, one, other in zip(NAMES, found, expected, strict=True):
        if name != "pre_bias":
            assert distance(one, other) < 1e-5, name


@pytest.mark.parametrize("implementation", ["xla_by_image", KERNEL])
def test_each_device_does_its_own_images(implementation):
    """On a mesh nothing is exchanged but the gradients of the weights; heads stay together."""
    given, cotangent = arguments(18, 4, batch=8, dim=8), arguments(18, 4, batch=8, dim=8, seed=1)[1]
    mesh = make_mesh(data=2, fsdp=2, tensor=2)

    def back(*given):
        return jax.vjp(attention(implementation), *given)[1](cotangent)

    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    whole = NamedSharding(mesh, PartitionSpec())
    lies = [rows] * 3 + [whole] * 4
    compiled = (
        jax.jit(constrain_batch(back, mesh), in_shardings=lies, out_shardings=tuple(lies))
        .lower(*given)
        .compile()
    )
    expected = gradients("xla", given, cotangent)
    for name, one, other in zip(
        NAMES, compiled(*jax.device_put(given, lies)), expected, strict=True
    ):
        if name != "pre_bias":
            assert distance(one, other) < 1e-5, name
    text = compiled.as_text()
    assert "all-gather(" not in text
    assert "all-to-all(" not in text


@pytest.mark.slow
def test_a_network_computes_the_same():
    """Stacked, with rematerialisation of what is elementwise: logits and gradients."""
    plain = create_model(
        "cait_nano4_patch4_8", depth=1, width=16, num_heads=2, attention="xla", precision="highest"
    )
    fused = plain.clone(attention="pallas_tpu_interpreted", remat="elementwise")
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, plain.in_channels))
    params = plain.init(jax.random.key(1), images)["params"]

    def loss(model, params):
        logits = model.apply({"params": params}, images, train=True)
        return (jax.nn.log_softmax(logits)[:, 0]).sum()

    (value, slope), (expected, expected_slope) = (
        jax.jit(jax.value_and_grad(functools.partial(loss, model)))(params)
        for model in (fused, plain)
    )
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    for one, other in zip(jax.tree.leaves(slope), jax.tree.leaves(expected_slope), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max() + 1e-6)


def test_maps_that_are_asked_for_are_those_of_the_plain_way():
    model = create_model("cait_nano4_patch4_8", depth=1, attention="pallas_gpu")
    images = jnp.zeros((1, 8, 8, model.in_channels))
    variables = model.init(jax.random.key(0), images)
    _, recorded = model.apply(variables, images, mutable=["intermediates"])
    assert recorded["intermediates"]["blocks"]["attn"]["mixed_softmax"].shape[-2:] == (4, 4)


# Memory


def lowered_for_tpu(implementation, given):
    """The program with its gradients, in StableHLO."""

    def both(*given):
        out, back = jax.vjp(attention(implementation, None), *given)
        return out, back(out)

    checks = [export.DisabledSafetyCheck.custom_call("tpu_custom_call")]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given]
    lowered = export.export(jax.jit(both), platforms=["tpu"], disabled_checks=checks)(*shapes)
    return lowered.mlir_module()


@pytest.mark.parametrize(("tokens", "heads"), [(196, 6), slow(576, 8)])
def test_no_array_of_heads_queries_and_keys_is_written(tokens, heads):
    given = arguments(tokens, heads, batch=2, dtype=jnp.bfloat16)
    maps = f"tensor<2x{heads}x{tokens}x{tokens}x"
    text = lowered_for_tpu("pallas_tpu", given)
    assert maps not in text
    assert text.count("stablehlo.custom_call") >= 2
    assert maps in lowered_for_tpu("xla", given)


@pytest.mark.parametrize(
    ("implementation", "kept"),
    [("xla", True), ("xla_remat", False), ("xla_by_image", False), ("pallas_gpu", False)],
)
def test_rematerialised_maps_are_not_kept_for_the_backward_pass(implementation, kept):
    given = arguments(20, 4, batch=2)
    backward = jax.eval_shape(lambda *given: jax.vjp(attention(implementation), *given)[1], *given)
    assert any(leaf.shape[-3:] == (4, 20, 20) for leaf in jax.tree.leaves(backward)) == kept


def test_the_tpus_kernel_keeps_one_array_by_token():
    """Queries, keys and values side by side, which needs little padding to whole lanes."""
    given = arguments(20, 4, batch=2)
    kept = jax.eval_shape(
        lambda *given: jax.vjp(attention("pallas_tpu_interpreted"), *given)[1], *given
    )
    by_token = [leaf.shape for leaf in jax.tree.leaves(kept) if 20 in leaf.shape]
    assert by_token == [(2, 20, 3 * 4 * 48)]


def kernels_of(jaxpr):
    for equation in jaxpr.eqns:
        if equation.primitive.name == "pallas_call":
            yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns") and equation.primitive.name != "pallas_call":
                yield from kernels_of(inner)


@pytest.mark.parametrize(("tokens", "heads"), [(196, 6), slow(784, 16)])
def test_a_tpu_kernel_says_what_it_moves(tokens, heads):
    """Operands and results once each, as every block is fetched once; padding of the last tile aside."""
    given = arguments(tokens, heads, batch=2, dtype=jnp.bfloat16)

    def both(*given):
        out, back = jax.vjp(attention("pallas_tpu_interpreted", None), *given)
        return back(out)

    found = list(kernels_of(jax.make_jaxpr(both)(*given).jaxpr))
    assert len(found) == 2
    for kernel in found:
        moved = sum(v.aval.size * v.aval.dtype.itemsize for v in (*kernel.invars, *kernel.outvars))
        assert kernel.params["cost_estimate"].bytes_accessed == pytest.approx(moved, rel=0.05)


@pytest.mark.parametrize("tokens", [1, 7, 196, 576, 784, 1000, 4096])
@pytest.mark.parametrize("heads", [2, 6, 16])
def test_tiles_fit_and_cover(tokens, heads):
    cut = tpu_kernels.tiling(tokens, heads, 48, arrays=4)
    assert tokens <= cut.padded < tokens + cut.queries
    assert cut.tiles == 1 or cut.queries % 8 == 0
    lanes = -(-tokens // 128) * 128
    assert 4 * heads * cut.queries * lanes * 4 <= tpu_kernels.TILE_BYTES or cut.queries == 8


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler is an extra")
@pytest.mark.parametrize(("tokens", "heads"), [(196, 4), (196, 6), (576, 8), (784, 16)])
def test_the_kernels_compile_for_a_tpu(tokens, heads):
    from cait_jax.plan.compile import tpu_devices
    from cait_jax.plan.roofline import parse_topology

    one = jax.sharding.SingleDeviceSharding(tpu_devices(parse_topology("v5e:2x2"))[0])
    given = [
        jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one)
        for x in arguments(tokens, heads, batch=2, dtype=jnp.bfloat16)
    ]

    def both(*given):
        out, back = jax.vjp(attention("pallas_tpu", None), *given)
        return out, back(out)

    compiled = jax.jit(both).lower(*given).compile()
    assert f"[2,{heads},{tokens},{tokens}]" not in compiled.as_text()


def test_names_are_checked():
    with pytest.raises(
        ValueError, match="unknown implementation of attention 'flash'; there are xla, "
    ):
        talking_heads_attention(*arguments(4, 2), implementation="flash")
    assert {*DEFAULT_ATTENTION.values()} <= {*IMPLEMENTATIONS}


def test_the_networks_own_attention_is_the_plain_one():
    """Bit for bit: q, k and v of the network, and the maps that it records, make the kernel's output."""
    model = create_model(
        "cait_nano4_patch4_8", depth=1, width=16, num_heads=2, stacked=False, attention="xla"
    )
    images = jax.random.normal(jax.random.key(0), (2, 8, 8, model.in_channels))
    params = model.init(jax.random.key(1), images)["params"]
    seen = {}

    def watch(call, args, kwargs, context):
        out = call(*args, **kwargs)
        if context.module.path[:2] == ("blocks_0", "attn"):
            seen[context.module.path[2:], context.method_name] = args, out
        return out

    with nn.intercept_methods(watch):
        model.apply({"params": params}, images)
    batch, tokens, _ = seen[("qkv",), "__call__"][1].shape
    q, k, v = (
        part.reshape(batch, tokens, 2, 8)
        for part in jnp.split(seen[("qkv",), "__call__"][1], 3, axis=-1)
    )
    (pre_weight, pre_bias), post = (seen[(name,), "weights"][1] for name in ("proj_l", "proj_w"))
    expected = talking_heads_attention(
        q, k, v, pre_weight * 8**-0.5, pre_bias, *post, implementation="xla"
    )
    (into_proj,), _ = seen[("proj",), "__call__"]
    np.testing.assert_array_equal(into_proj, expected.reshape(into_proj.shape))
