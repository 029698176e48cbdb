"""GPUs as targets of compilation: their target configs, and a step that XLA compiles for them without a GPU."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest
from click.testing import CliRunner
from jax.sharding import NamedSharding, PartitionSpec

from cait_jax import UserError
from cait_jax.cli import main
from cait_jax.plan.compile import compile_cached
from cait_jax.plan.gpu import gpu_devices, has_compiler, target_config
from cait_jax.plan.hlo import collectives, read_program
from cait_jax.plan.plan import make_plan
from cait_jax.plan.roofline import CHIPS, kernel_launches, memory_traffic, parse_topology
from cait_jax.train.config import load_config
from configs import digits

compiles = pytest.mark.skipif(not has_compiler(), reason="the GPUs' compiler is an extra")
GPUS = [name for name, chip in CHIPS.items() if chip.family == "gpu"]


@pytest.mark.parametrize("name", GPUS)
def test_a_target_config_agrees_with_the_published_rates(name):
    lines = [line.strip().partition(": ") for line in target_config(name).splitlines()]
    values = {key: value for key, _, value in lines}
    assert float(values["memory_bandwidth"]) == pytest.approx(CHIPS[name].bandwidth, rel=0.01)
    assert float(values["device_memory_size"]) == pytest.approx(CHIPS[name].memory, rel=0.1)


def test_without_the_plugin_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr("cait_jax.plan.plan.has_compiler", lambda: False)
    arguments = ["plan", "--config=configs/digits.py", "--topology=h100:2", "--json"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert 'pip install "cait-jax[plan-gpu]"' in result.stderr
    assert json.loads(result.stdout)[0]["estimate"]
    asked = CliRunner().invoke(main, [*arguments, "--estimate"])
    assert asked.stdout == result.stdout
    assert "pip install" not in asked.stderr


def test_estimates_are_for_gpus():
    with pytest.raises(UserError, match="--estimate is for GPUs: leave it out for v5e:2x2"):
        make_plan(digits.get_config(), parse_topology("v5e:2x2"), estimate=True)


def test_the_workspace_of_a_product_is_not_traffic():
    program = read_program(
        """
ENTRY %main (a: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[64,64]{1,0} parameter(0)
  %gemm = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%a, %a), custom_call_target="__cublas$gemm"
  ROOT %out = bf16[64,64]{1,0} get-tuple-element(%gemm), index=0
}
"""
    )
    assert memory_traffic(program) == 3 * 64 * 64 * 2
    assert kernel_launches(program) == 1


@compiles
@pytest.mark.parametrize("name", GPUS)
def test_a_product_compiles_and_is_summed_over_machines(name, tmp_path):
    topology = parse_topology(f"{name}:2x4")
    devices = gpu_devices(topology)
    assert [device.process_index for device in devices] == [0] * 4 + [1] * 4
    mesh = jax.sharding.Mesh(devices, ("data",))

    def struct(*shape, spec):
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))

    @jax.jit
    def gradient(weights, inputs):
        return jax.grad(lambda weights: ((inputs @ weights) ** 2).sum())(weights)

    lowered = gradient.lower(
        struct(64, 32, spec=PartitionSpec()), struct(128, 64, spec=PartitionSpec("data"))
    )
    found = compile_cached(lowered, topology, tmp_path, 0, lambda message: None)
    assert found.arguments == 4 * (64 * 32 + 16 * 64 + 64 * 32)
    (summed,) = collectives(read_program(found.text))
    assert (summed.kind, summed.bytes, summed.group) == ("all-reduce", 4 * 64 * 32, 8)


@compiles
@pytest.mark.slow
def test_a_step_is_compiled_for_gpus_and_kept(tmp_path):
    config = digits.get_config()
    config.model.depth, config.model.width, config.model.num_heads = 2, 32, 4
    config.batch_size = 64
    said, topology = [], parse_topology("h100:8")
    plan = make_plan(config, topology, folder=tmp_path, say=said.append)
    assert said == ["compiling for h100:1x8; this takes minutes"]
    assert plan.compiled
    assert plan.memory > plan.state
    assert plan.kernels > 100
    assert {each.kind for each in plan.exchanged} == {"all-reduce"}
    guess = make_plan(config, topology, estimate=True)
    assert not guess.compiled
    assert guess.operations == pytest.approx(plan.operations, rel=0.01)
    assert guess.state == plan.state
    again = make_plan(config, topology, folder=tmp_path, say=said.append)
    assert replace(again, seconds=plan.seconds) == plan
    assert len(said) == 1


@compiles
@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "images", "memory"),
    [("configs/cait_s24.py", 128, 22.4e9), ("configs/cait_xs24.py:384", 32, 28.5e9)],
)
def test_the_memory_of_a_plain_step_is_what_was_once_found(recipe, images, memory, tmp_path):
    """Without remat or a kernel; the figures are of the bare step, without augmentation, EMA and metrics."""
    plain = {"batch_size": str(images), "model.remat": "none", "model.attention": "xla"}
    plan = make_plan(load_config(recipe, plain), parse_topology("h100:1"), folder=tmp_path)
    assert plan.memory == pytest.approx(memory, rel=0.02)
