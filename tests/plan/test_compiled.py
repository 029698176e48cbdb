"""TPU's compiler: what it is asked, and what is done about what it cannot say."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from cait_jax import UserError
from cait_jax.augment.randaugment import equalize, warp
from cait_jax.plan.chips import parse_topology
from cait_jax.plan.compiled import compile_cached, tpu_devices
from cait_jax.plan.program import read_program


@pytest.fixture
def asked(monkeypatch):
    """What a compiler was asked that prints nothing unless it is asked for something."""
    asked = []
    really, prints = jax.stages.Lowered.compile, jax.stages.Compiled.as_text

    def compile_(lowered, compiler_options=None):
        asked.append(compiler_options)
        return really(lowered)

    def as_text(program):
        if asked[-1] is None:
            raise jax.errors.JaxRuntimeError("INTERNAL: an instruction should have 1 operand")
        return prints(program)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", as_text)
    return asked


def test_what_cannot_be_printed_is_compiled_without_sparse_cores(asked, tmp_path):
    said, lowered = [], jax.jit(jnp.cos).lower(jnp.zeros(4))
    found = compile_cached(lowered, parse_topology("v6e:2x2"), tmp_path, 0, said.append)
    assert "cosine" in found.text
    first, second = asked
    assert first is None
    assert set(second.values()) == {"false"}
    assert said[1:] == [
        "libtpu cannot print this program; compiling again, without its SparseCores"
    ]


def test_what_cannot_be_printed_at_all_is_said(asked, monkeypatch, tmp_path):
    monkeypatch.setattr("cait_jax.plan.compiled._WITHOUT_SPARSE_CORES", None)
    lowered = jax.jit(jnp.cos).lower(jnp.zeros(4))
    with pytest.raises(UserError, match="TPU's compiler fails for v6e:2x2: INTERNAL: an instr"):
        compile_cached(lowered, parse_topology("v6e:2x2"), tmp_path, 0, [].append)
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
