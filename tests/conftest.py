"""Eight simulated devices, and no silent broadcasting, for every test."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax

if jax.config.jax_platforms == "cpu":
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
