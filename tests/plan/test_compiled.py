"""TPU's compiler: what it is asked, and what is done about what it cannot say."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from cait_jax import UserError
from cait_jax.data.pixels import equalize
from cait_jax.data.warp import warp
from cait_jax.plan.chips import parse_topology
from cait_jax.plan.compiled import compile_cached, tpu_devices
from cait_jax.plan.program import read_program


class Unprintable:
    def as_text(self):
        raise jax.errors.JaxRuntimeError(
            "INTERNAL: async-update instruction should have 1 operands"
        )


class Lowered:
    """Of which the compiler prints nothing unless it is asked otherwise."""

    def __init__(self, printable):
        self.real = jax.jit(jnp.cos).lower(jnp.zeros(4))
        self.printable, self.asked = printable, []

    def as_text(self):
        return self.real.as_text()

    def compile(self, compiler_options=None):
        self.asked.append(compiler_options or {})
        return self.real.compile() if compiler_options and self.printable else Unprintable()


def test_what_cannot_be_printed_is_compiled_without_sparse_cores(tmp_path):
    said, lowered = [], Lowered(printable=True)
    found = compile_cached(lowered, parse_topology("v6e:2x2"), tmp_path, 0, said.append)
    assert "cosine" in found.text
    first, second = lowered.asked
    assert not first
    assert set(second.values()) == {"false"}
    assert said[1:] == [
        "libtpu cannot print this program; compiling again, without its SparseCores"
    ]


def test_what_cannot_be_printed_at_all_is_said(tmp_path):
    with pytest.raises(UserError, match="TPU's compiler fails for v6e:2x2: INTERNAL: async-update"):
        compile_cached(Lowered(printable=False), parse_topology("v6e:2x2"), tmp_path, 0, print)
    assert not [*tmp_path.iterdir()]


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="TPU's compiler is an extra")
@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_lookups_compile_for_every_chip(topology, tmp_path):
    topology = parse_topology(topology)
    one = jax.sharding.SingleDeviceSharding(tpu_devices(topology)[0])
    images = jax.ShapeDtypeStruct((4, 224, 224, 3), jnp.uint8, sharding=one)
    inverses = jax.ShapeDtypeStruct((4, 2, 3), jnp.float32, sharding=one)

    def look_up(images, inverses):
        return jax.vmap(equalize)(images), jax.vmap(warp)(images, inverses)

    lowered = jax.jit(look_up).trace(images, inverses).lower(lowering_platforms=("tpu",))
    found = compile_cached(lowered, topology, tmp_path, 0, lambda message: None)
    assert found.memory > 0
    assert read_program(found.text).times
