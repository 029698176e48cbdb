"""Eight simulated devices, and no silent broadcasting, for every test."""

import os
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
    # Most of the suite's time is compilation. The mathematics stays; only the machine code is slower.
    jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Runs that several tests repeat compile once a session.
_cache = tempfile.TemporaryDirectory()
jax.config.update("jax_compilation_cache_dir", _cache.name)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
