"""Eight simulated devices, and no silent broadcasting, for every test."""

import ctypes
import gc
import os
import sys
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
    # Most of the suite's time is compilation. The mathematics stays; only the machine code is slower.
    jax.config.update("jax_disable_most_optimizations", True)
    if jax.__version_info__ < (0, 11):  # later ones end at a flag that they have dropped
        given = os.environ.get("XLA_FLAGS")
        os.environ["XLA_FLAGS"] = f"{given or ''} --xla_cpu_use_fusion_emitters=false".strip()
        jax.devices()  # reads it; the processes that tests start compile as a user's do
        if given is None:
            del os.environ["XLA_FLAGS"]
        else:
            os.environ["XLA_FLAGS"] = given
jax.config.update("jax_numpy_rank_promotion", "raise")

# Runs that several tests repeat compile once a session.
_cache = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def pytest_collection_modifyitems(items):
    """Tests for a GPU say that they are skipped where JAX runs on something else."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and jax.default_backend() != "gpu":
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="JAX runs on no GPU: set JAX_PLATFORMS=cuda"))


def _free_compiled_programs():
    """Drops programs and traces, some hundred MB; what later tests share is read from the disk again."""
    jax.clear_caches()
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed in its arenas


@pytest.fixture(scope="module", autouse=True)
def _modules_start_empty():
    yield
    _free_compiled_programs()


@pytest.fixture(autouse=True)
def _large_tests_leave_nothing():
    yield
    pages = Path("/proc/self/statm")  # the second number: those in memory
    if pages.exists() and int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") > 2**30:
        _free_compiled_programs()
