"""TPU's compiler: what it is asked, what is done about what it cannot say, and the largest batch that fits."""

import importlib.util

import jax
import jax.numpy as jnp
import pytest

from cait_jax import UserError
from cait_jax.augment.randaugment import equalize, warp
from cait_jax.plan.compile import compile_cached, largest_batch, needed_bytes, tpu_devices
from cait_jax.plan.hlo import read_program
from cait_jax.plan.roofline import parse_topology


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
    monkeypatch.setattr("cait_jax.plan.compile._WITHOUT_SPARSE_CORES", None)
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


@pytest.mark.parametrize("multiple", [1, 8])
@pytest.mark.parametrize("capacity", [500.0, 10_000.0])
@pytest.mark.parametrize("start", [8, 64, 1024])
def test_the_largest_batch_is_found(start, capacity, multiple):
    tried = []

    def memory_of(batch):
        tried.append(batch)
        return 100.0 + 3.0 * batch

    found = largest_batch(memory_of, capacity, start, multiple=multiple)
    assert found.batch == int((capacity - 100) / 3) // multiple * multiple
    assert found.memory == 100.0 + 3.0 * found.batch <= capacity
    assert (found.fixed, found.by_image) == pytest.approx((100, 3))
    assert len(tried) <= 3


def test_a_compiler_that_saves_near_the_limit_is_asked_again():
    """Memory that grows faster above 100 images than below."""

    def memory_of(batch):
        return 2.0 * batch if batch <= 100 else 200 + 5.0 * (batch - 100)

    found = largest_batch(memory_of, 300.0, 16)
    assert memory_of(found.batch) <= 300 < memory_of(found.batch + 3)


def test_an_image_takes_what_it_takes_far_from_the_limit():
    """XS24 on v5e, in MB: refused at 339 images and, needing more, at 336."""

    def memory_of(batch):
        return {339: 17_480.0, 335: 17_530.0, 336: 17_530.0, 328: 15_480.0}.get(
            batch, 47.88 * batch + 678
        )

    found = largest_batch(memory_of, 16_910.0, 32)
    assert 326 <= found.batch < 335
    assert 40 < found.by_image < 60


def test_nothing_fits():
    assert largest_batch(lambda batch: 1000.0 + batch, 500.0, 8).batch == 0


@pytest.mark.parametrize(
    ("message", "size"),
    [
        (
            "memory required for HLO temporaries (22.19G) exceeds available HBM (15.75G)",
            22.19 * 2**30,
        ),
        ("Used 512.5M of 128M hbm", 512.5 * 2**20),
        ("no numbers", 0),
    ],
)
def test_a_refusal_names_what_is_needed(message, size):
    assert needed_bytes(message) == round(size)
