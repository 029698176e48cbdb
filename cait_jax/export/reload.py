"""Runs an exported StableHLO folder by JAX alone, in a process of its own, on every platform that is here.

python -P reload.py FOLDER PROBES.npz FOUND.npz

`PROBES.npz` holds `images`. `FOUND.npz` gets, for each platform that ran, `PLATFORM/one/NUMBER` of the first image
alone, `PLATFORM/all/NUMBER` of all at once, and `PLATFORM/seconds`, the least of three for all; for others
`PLATFORM/why`, a sentence.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from safetensors.numpy import load_file


def main(folder: Path, probes: Path, found: Path) -> None:
    """Writes `FOUND.npz`."""
    exported = jax.export.deserialize(bytearray((folder / "model.jax_export").read_bytes()))
    weights = load_file(folder / "model.safetensors")
    images = np.load(probes)["images"]
    results: dict[str, Any] = {}
    for platform in exported.platforms:
        try:
            device = jax.devices(platform)[0]
        except RuntimeError:
            results[f"{platform}/why"] = f"JAX finds no {platform} device here"
            continue
        on_device = jax.device_put(weights, device)
        call = jax.jit(exported.call)
        for name, batch in (("one", images[:1]), ("all", images)):
            batch = jax.device_put(batch, device)
            for number, output in enumerate(call(on_device, batch)):
                results[f"{platform}/{name}/{number}"] = np.asarray(output, np.float32)
        times = []
        for _ in range(3):
            start = time.perf_counter()
            jax.block_until_ready(call(on_device, batch))
            times.append(time.perf_counter() - start)
        results[f"{platform}/seconds"] = min(times)
    np.savez(found, **results)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
