"""What a run wrote, for comparing two runs of one config."""

from cait_jax.train.metrics import TIMING_KEYS, read_metrics

# For a process that is killed or has no room: half of a program would stay in the compilation cache.
WRITES_NO_CACHE = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1e9"}


def untimed(workdir):
    """The rows of a run's metrics.jsonl without what depends on the clock."""
    return [
        {key: value for key, value in row.items() if key not in TIMING_KEYS}
        for row in read_metrics(workdir / "metrics.jsonl")
    ]
