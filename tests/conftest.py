"""Eight simulated devices, and no silent broadcasting, for every test."""

import ctypes
import gc
import os
import signal
import sys
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

# A shell's background job ignores it, and so would the processes that tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE_BYTES = 2**29
MEMORY_BYTES = 9 * 2**27  # of each worker


def pytest_configure(config):
    """Programs are compiled once for both workers and later runs: they stay in `.pytest_cache/d/jax`."""
    if (cache := getattr(config, "cache", None)) is None:  # by `-p no:cacheprovider`
        return
    directory = cache.mkdir("jax")
    if not hasattr(config, "workerinput"):
        # JAX's own limit (`jax_compilation_cache_max_size`) reads all of the directory at every write.
        _delete_oldest(directory, CACHE_BYTES)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _delete_oldest(directory, limit):
    """Deletes the files that were written first until the others have at most `limit` bytes."""
    files = [(file, file.stat()) for file in directory.rglob("*") if file.is_file()]
    excess = sum(stat.st_size for _, stat in files) - limit
    for file, stat in sorted(files, key=lambda file: file[1].st_mtime):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= stat.st_size


@pytest.fixture(scope="session")
def compilation_cache(request, tmp_path_factory):
    """Environment variables with which a process shares the compiled programs of the tests."""
    cache = getattr(request.config, "cache", None)
    directory = cache.mkdir("jax") if cache else tmp_path_factory.mktemp("jax")
    return {
        "JAX_COMPILATION_CACHE_DIR": str(directory),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }


def pytest_collection_modifyitems(items):
    """Tests for a GPU say that they are skipped where JAX runs on something else."""
    needs_gpu = [item for item in items if item.get_closest_marker("gpu")]
    if needs_gpu and jax.default_backend() != "gpu":
        for item in needs_gpu:
            item.add_marker(pytest.mark.skip(reason="JAX runs on no GPU: set JAX_PLATFORMS=cuda"))


def _memory():
    """Bytes of this process that are in memory, where /proc says it."""
    pages = Path("/proc/self/statm")
    return int(pages.read_text().split()[1]) * os.sysconf("SC_PAGESIZE") if pages.exists() else 0


@pytest.fixture(autouse=True)
def _large_processes_forget():
    """Programs and traces, some hundred MB; what later tests share is read from the disk again."""
    yield
    if _memory() > MEMORY_BYTES:
        jax.clear_caches()
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # glibc keeps what is freed in its arenas
