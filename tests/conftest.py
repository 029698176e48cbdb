"""Eight simulated devices, and no silent broadcasting, for every test."""

import os
import tempfile

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
