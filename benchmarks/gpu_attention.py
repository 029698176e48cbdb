"""Talking-heads attention on a GPU: errors against float64, and times beside XLA and timm under torch.compile.

Command: python benchmarks/gpu_attention.py [--attention xla pallas_gpu] [--rounds 5] [--calls 20]
         python benchmarks/gpu_attention.py --compiled=h100
The first needs a GPU; timm's side runs where torch and timm are installed. The second needs JAX's CUDA plugin: it
compiles for a GPU that is not here and prints the bytes that go to and from memory, from which no time follows.
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax.errors import UserError
from cait_jax.kernels import IMPLEMENTATIONS, talking_heads_attention
from cait_jax.plan.gpu import COMPILER_OPTIONS, gpu_devices, has_compiler
from cait_jax.plan.hlo import read_program
from cait_jax.plan.roofline import memory_traffic, parse_topology

# Tokens and heads: XXS24 and S24 at 224 pixels, XS24 at 384, M48 at 448; images.
SHAPES = [(196, 4, 256), (196, 8, 128), (576, 6, 32), (784, 16, 8)]
DIM = 48


def arguments(tokens: int, heads: int, batch: int, dtype: str, seed: int = 0) -> list[Any]:
    """q, k, v and the weights of both mixtures, drawn so that softmaxes are neither flat nor pointed."""
    draw = np.random.default_rng(seed).normal
    sizes = [(batch, tokens, heads, DIM)] * 3 + [(heads, heads), (heads,)] * 2
    scales = [DIM**-0.5, 1, 1, heads**-0.5, 1, heads**-0.5, 0.1]
    pairs = zip(sizes, scales, strict=True)
    return [jnp.asarray(draw(size=size) * scale, dtype) for size, scale in pairs]


def functions(name: str, precision: str | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Of packed q, k and v and the weights: the output, and with all gradients."""

    def forward(packed: Any, *weights: Any) -> Any:
        batch, tokens, width = packed.shape
        shape = (batch, tokens, width // 3 // DIM, DIM)
        parts = (x.reshape(shape) for x in jnp.split(packed, 3, axis=-1))
        return talking_heads_attention(*parts, *weights, implementation=name, precision=precision)

    def both(*given: Any) -> Any:
        out, back = jax.vjp(forward, *given)
        return out, back(out)

    return forward, both


def packed(q: Any, k: Any, v: Any, *weights: Any) -> list[Any]:
    batch, tokens = q.shape[:2]
    return [jnp.concatenate([x.reshape(batch, tokens, -1) for x in (q, k, v)], axis=-1), *weights]


def errors(name: str, tokens: int, heads: int, dtype: str) -> list[float]:
    """Of the output and of each gradient, over the largest number in float64."""
    given = packed(*arguments(tokens, heads, 2, dtype))
    found = jax.tree.leaves(jax.jit(functions(name, "highest")[1])(*given))
    with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in given]
        cotangent = jnp.asarray(np.asarray(found[0], np.float64))
        out, back = jax.vjp(functions("xla", "highest")[0], *wide)
        expected = [np.asarray(x) for x in (out, *back(cotangent))]
    pairs = zip(found, expected, strict=True)
    return [
        float(np.abs(np.asarray(x, np.float64) - y).max() / (np.abs(y).max() + 1e-9))
        for x, y in pairs
    ]


def milliseconds(
    call: Callable[[], Any], wait: Callable[[Any], Any], rounds: int, calls: int
) -> float:
    """Median over rounds of the time of one call."""
    wait(call())
    found = []
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        wait(out)
        found.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(found)


def timm_attention(
    tokens: int, heads: int, batch: int
) -> tuple[Callable[[], Any], Callable[[], Any], Any] | None:
    """timm's attention under torch.compile, with its projections: forward, both ways, and what waits."""
    try:
        import torch
        from timm.models.cait import TalkingHeadAttn
    except ImportError:
        return None
    block = torch.compile(
        TalkingHeadAttn(heads * DIM, num_heads=heads, qkv_bias=True).cuda().bfloat16()
    )
    images = torch.randn(batch, tokens, heads * DIM, device="cuda", dtype=torch.bfloat16)

    def forward() -> Any:
        with torch.no_grad():
            return block(images)

    def both() -> Any:
        block(images).float().sum().backward()

    return forward, both, lambda _: torch.cuda.synchronize()


def measure(args: argparse.Namespace) -> None:
    """Errors, then microseconds an image."""
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for tokens, heads in [(37, 3), *[shape[:2] for shape in SHAPES]]:
        for dtype in ("float32", "bfloat16"):
            for name in args.attention:
                worst = errors(name, tokens, heads, dtype)
                print(
                    f"error {tokens} {heads} {dtype} {name}",
                    *(f"{e:.1e}" for e in worst),
                    flush=True,
                )
    for tokens, heads, batch in SHAPES:
        given = packed(*arguments(tokens, heads, batch, "bfloat16"))
        for name in args.attention:
            calls = [functools.partial(jax.jit(f), *given) for f in functions(name, None)]
            took = [milliseconds(c, jax.block_until_ready, args.rounds, args.calls) for c in calls]
            report(tokens, heads, batch, name, took)
        if timm := timm_attention(tokens, heads, batch):
            *both, wait = timm
            took = [milliseconds(c, wait, args.rounds, args.calls) for c in both]
            report(tokens, heads, batch, "timm compiled, with its projections", took)


def report(tokens: int, heads: int, batch: int, name: str, took: list[float]) -> None:
    forward, both = (1e3 * each / batch for each in took)
    line = f"{tokens} tokens, {heads} heads, {batch} images, {name}:"
    print(f"{line} forward {forward:.2f}, both ways {both:.2f} us an image", flush=True)


def count(args: argparse.Namespace) -> None:
    """Megabytes an image to and from memory, as compiled for a GPU that is not here."""
    if not has_compiler():
        raise UserError('--compiled needs JAX\'s CUDA plugin: pip install "cait-jax[plan-gpu]"')
    device = gpu_devices(parse_topology(f"{args.compiled}:1"))[0]
    one = jax.sharding.SingleDeviceSharding(device)
    target = jax.sharding.AbstractMesh(
        (1,), ("data",), (jax.sharding.AxisType.Auto,),
        abstract_device=jax.sharding.AbstractDevice(device.device_kind, None, "gpu"),
    )  # fmt: skip
    for tokens, heads, _ in SHAPES:
        arrays = packed(*arguments(tokens, heads, 8, "bfloat16"))
        given = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one) for x in arrays]
        for name in args.attention:
            found = []
            for function in functions(name, None):
                with jax.sharding.use_abstract_mesh(target):
                    lowered = jax.jit(function).lower(*given)
                compiled = lowered.compile(compiler_options=COMPILER_OPTIONS)
                found.append(memory_traffic(read_program(compiled.as_text())) / 8e6)
            forward, both = found
            line = f"{tokens} tokens, {heads} heads, {name}:"
            print(f"{line} forward {forward:.2f}, both ways {both:.2f} MB an image", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--attention", nargs="+", default=["xla", "pallas_gpu"], choices=IMPLEMENTATIONS
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calls", type=int, default=20, help="in each round")
    parser.add_argument(
        "--compiled", metavar="GPU", help="a100, h100, h200 or rtx4090, which is not here"
    )
    args = parser.parse_args()
    try:
        if args.compiled:
            return count(args)
        if jax.default_backend() != "gpu":
            raise UserError("there is no GPU here; --compiled=h100 compiles for one that is not")
        measure(args)
    except UserError as error:
        sys.exit(f"gpu_attention.py: {error}")


if __name__ == "__main__":
    main()
