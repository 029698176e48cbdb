"""Each core of a CPU as a device, by default.

XLA splits every operation of one CPU device over all cores and synchronises after each. As devices of a mesh,
cores take images of their own and synchronise once a step. JAX's own default is one CPU device.
"""

import contextlib
import math
import os
from collections.abc import Callable
from pathlib import Path

import jax

from cait_jax.allocator import keep_freed_memory

MOST_DEVICES = (
    8  # each holds a copy of the parameters; the cores beyond still share the operations of all
)
BYTES_A_DEVICE = 2**31  # of memory
_CPUS, _QUOTA = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup/cpu.max")


def use_cores(fits: Callable[[int], bool] = lambda devices: True) -> None:
    """Makes the cores of the CPU as many devices as `fits` allows, at most 8 and one for each 2 GiB of memory.

    Call it before JAX is asked for its devices; later it changes nothing. Nor does it where the number is set by
    `JAX_NUM_CPU_DEVICES`, its config or `XLA_FLAGS`. Devices of other kinds are not touched. Freed memory is kept,
    see `allocator`.
    """
    keep_freed_memory()
    chosen = getattr(jax.config, "jax_num_cpu_devices", -1)
    if chosen != -1 or "xla_force_host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return
    most = min(usable_cores(), MOST_DEVICES, _memory() // BYTES_A_DEVICE)
    count = next((devices for devices in range(most, 1, -1) if fits(devices)), 1)
    if count > 1:
        with contextlib.suppress(RuntimeError):  # JAX has devices
            jax.config.update("jax_num_cpu_devices", count)


def usable_cores() -> int:
    """Physical cores that this process may use, by its affinity and the container's CPU quota."""
    affinity = getattr(os, "sched_getaffinity", None)
    threads = affinity(0) if affinity else range(os.cpu_count() or 1)
    cores = {_siblings(thread) for thread in threads}
    return max(1, min(len(cores), _quota()))


def _siblings(thread: int) -> str:
    """The threads of a thread's core; where the system does not tell, a core of its own."""
    try:
        return (_CPUS / f"cpu{thread}/topology/thread_siblings_list").read_text()
    except (OSError, UnicodeDecodeError):
        return str(thread)


def _quota() -> int:
    """Cores of a container's CPU quota (cgroup v2), rounded up."""
    try:
        quota, period = _QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError, ZeroDivisionError):  # none, or "max"
        return 2**31


def _memory() -> int:
    """Bytes of the machine; unlimited where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return 2**62
