"""NVIDIA GPUs as targets of AOT compilation: XLA's target configs, and devices made of them.

XLA reads a target config (`stream_executor::GpuTargetConfigProto`, as text) in place of a GPU's own answers. The
numbers are those that cards report to CUDA; the fields' names and the defaults are XLA's.
"""

import dataclasses
import importlib.util

import jax

from cait_jax.errors import UserError
from cait_jax.plan.roofline import Topology

# Tuning needs the card; untuned, Triton finds no tiles for some products, which are then cuBLAS's.
COMPILER_OPTIONS: dict[str, str | bool] = {
    "xla_gpu_autotune_level": "0",
    "xla_gpu_enable_triton_gemm": False,
}
PACKAGES = ("jax-cuda12-pjrt", "jax-cuda13-pjrt")


@dataclasses.dataclass(frozen=True)
class _Card:
    name: str  # as the driver says it
    capability: tuple[int, int]
    multiprocessors: int
    lanes: int  # of float32 in each multiprocessor
    threads: int  # at most, in each multiprocessor
    shared: int  # bytes of shared memory in each multiprocessor
    shared_by_block: int  # bytes at most, asked for explicitly
    cache: int  # bytes of L2
    clock: float  # GHz
    bandwidth: int  # bytes a second
    memory: int  # bytes


_CARDS = {
    "a100": _Card(
        "NVIDIA A100-SXM4-80GB", (8, 0), 108, 64, 2048, 167_936, 166_912, 40 << 20, 1.41,
        2_039_040_000_000, 85_100_068_864,
    ),
    "h100": _Card(
        "NVIDIA H100 80GB HBM3", (9, 0), 132, 128, 2048, 233_472, 232_448, 50 << 20, 1.98,
        3_352_320_000_000, 84_942_979_072,
    ),
    "h200": _Card(
        "NVIDIA H200 141GB HBM3e", (9, 0), 132, 128, 2048, 233_472, 232_448, 50 << 20, 1.98,
        4_800_000_000_000, 151_397_597_184,
    ),
    "rtx4090": _Card(
        "NVIDIA GeForce RTX 4090", (8, 9), 128, 128, 1536, 102_400, 101_376, 72 << 20, 2.52,
        1_008_096_000_000, 25_393_692_672,
    ),
}  # fmt: skip


def target_config(name: str) -> str:
    """XLA's target config of a chip of `CHIPS`, a protobuf as text."""
    card = _CARDS[name]
    major, minor = card.capability
    features = "ACCELERATED_FEATURES" if major >= 9 else "NONE"
    return f"""\
gpu_device_info {{
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: {card.shared}
  shared_memory_per_block_optin: {card.shared_by_block}
  threads_per_core_limit: {card.threads}
  core_count: {card.multiprocessors}
  fpus_per_core: {card.lanes}
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: {card.bandwidth}
  l2_cache_size: {card.cache}
  clock_rate_ghz: {card.clock}
  device_memory_size: {card.memory}
  pcie_bandwidth: 34359738368
  cuda_compute_capability {{ major: {major} minor: {minor} feature_extension: {features} }}
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "{card.name}"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
runtime_version {{ major: 12 minor: 8 patch: 0 }}
device_description_str: "{card.name}"
"""


def has_compiler() -> bool:
    """Whether a CUDA plugin of JAX is installed."""
    return any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))


def gpu_devices(topology: Topology) -> list[jax.Device]:
    """The GPUs of `topology` as targets of AOT compilation, one process for each machine.

    Raises:
      UserError: the plugin does not load, or takes no such shape.
    """
    from jax.experimental import topologies

    machines, inside = topology.shape
    try:
        found = topologies.get_topology_desc(
            platform="cuda",
            target_config=target_config(topology.chip.name),
            topology=f"1x{machines}x{inside}",
        )
    except Exception as error:  # of any type
        first = str(error).strip().splitlines()[0].rstrip(".")
        raise UserError(
            f"XLA's compiler for GPUs refuses {topology}: {first}; --estimate does without it"
        ) from error
    return list(found.devices)
