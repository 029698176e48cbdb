"""Memory that XLA frees stays with the process, for its next step on CPUs.

XLA allocates the temporary buffers of a step anew in each. glibc gives large blocks back to the system when they
are freed, and the next step faults every page in again.
"""

import ctypes
import importlib.util
import os
import sys

import jax

# glibc's malloc.h: options of `mallopt` and their values.
_KEEP = {
    -8: 1,  # M_ARENA_MAX: other arenas than the first return memory by themselves
    -4: 0,  # M_MMAP_MAX: no block has a mapping of its own
    -1: 2**31 - 1,  # M_TRIM_THRESHOLD
}
_PLUGINS = (
    "jax_cuda12_plugin",
    "jax_cuda13_plugin",
    "jax_rocm60_plugin",
    "jax_rocm7_plugin",
    "libtpu",
)


def keep_freed_memory() -> bool:
    """Has glibc keep what is freed, and says whether it does.

    Call it before JAX has threads. Nothing is changed where the user set `GLIBC_TUNABLES` or a `MALLOC_` variable,
    where JAX may compute elsewhere than on CPUs, or where malloc is not glibc's.
    """
    chosen = "GLIBC_TUNABLES" in os.environ or any(
        name.startswith("MALLOC_") for name in os.environ
    )
    if chosen or not sys.platform.startswith("linux") or not _only_cpus():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(*option) == 1 for option in _KEEP.items())


def _only_cpus() -> bool:
    if platforms := getattr(jax.config, "jax_platforms", None):
        return bool(platforms == "cpu")
    return not any(map(importlib.util.find_spec, _PLUGINS))
