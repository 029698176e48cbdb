"""`cait predict` over photographs beside timm's loop with its own loader: seconds from the command to the result.

Command: python benchmarks/predict.py PHOTOGRAPHS --torch-python=PYTHON [--model=cait_xxs24_224] [--images=200]
         [--rounds=3] [--out=runs/benchmark_predict]
  PHOTOGRAPHS is a folder of images, in folders too; PYTHON is of an environment with torch, timm and safetensors.

Both sides are new processes that read the same drawn weights and the same files, decode, crop, run the network and
print five classes of each image. Rounds alternate; medians. JAX's compilation cache is empty in the first round
("cold") and kept for the others, as it is between a user's commands. The classes that both find must agree.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from export_to_timm import drawn_weights
from reports import write_report
from tabulate import tabulate

from cait_jax import Preprocessing, create_model, export_timm
from cait_jax.data.image_files import find_images
from cait_jax.weights.timm_names import from_timm


def save_drawn(name: str, folder: Path) -> None:
    """A model with drawn weights, which both sides load."""
    model = create_model(name)
    export_timm(
        folder,
        model,
        from_timm(drawn_weights(model), model),
        preprocessing=Preprocessing(model.image_size),
    )


def run(command: list[str], environment: dict[str, str]) -> tuple[float, str]:
    """Seconds and standard output."""
    start = time.perf_counter()
    done = subprocess.run(
        command, env=os.environ | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"predict.py: {command[:4]} failed:\n{done.stderr[-2000:]}")
    return time.perf_counter() - start, done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--torch-python", required=True)
    parser.add_argument("--model", default="cait_xxs24_224")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_predict"))
    args = parser.parse_args()
    found = find_images([str(args.photographs)]).paths
    step = max(1, len(found) // args.images)
    paths = [str(Path(path).absolute()) for path in found[::step][: args.images]]
    answers: dict[str, str] = {}
    seconds: dict[str, list[float]] = {"cait predict": [], "timm": []}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        save_drawn(args.model, model)
        cache = {
            "JAX_COMPILATION_CACHE_DIR": f"{folder}/cache",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        ours = [
            sys.executable,
            "-m",
            "cait_jax",
            "predict",
            *paths,
            "--model",
            str(model),
            "--json",
        ]
        theirs = [
            args.torch_python, str(Path(__file__).with_name("predict_torch.py")), str(model), *paths
        ]  # fmt: skip
        for _ in range(args.rounds + 1):
            for name, command, environment in (
                ("cait predict", ours, cache),
                ("timm", theirs, {}),
            ):
                took, answers[name] = run(command, environment)
                seconds[name].append(took)
            check(answers["cait predict"], answers["timm"])
    cold = {name: each[0] for name, each in seconds.items()}
    warm = {name: statistics.median(each[1:]) for name, each in seconds.items()}
    rows = [
        [name, f"{cold[name]:.1f}", f"{warm[name]:.1f}",
         " ".join(f"{each:.1f}" for each in seconds[name][1:])]
        for name in seconds
    ]  # fmt: skip
    print(tabulate(rows, ["", "cold (s)", "seconds", "all"], disable_numparse=True))
    ratios = {
        "cold": cold["timm"] / cold["cait predict"],
        "ratio": warm["timm"] / warm["cait predict"],
    }
    print(
        f"{len(paths)} photographs, {args.model}: timm over cait {ratios['ratio']:.2f}, with an empty "
        f"compilation cache {ratios['cold']:.2f}"
    )
    write_report(
        args.out / "predict.json", model=args.model, images=len(paths), seconds=seconds, **ratios
    )


def check(ours: str, theirs: str) -> None:
    """Refuses sides whose probabilities differ."""
    first, other = (
        [value(json.loads(line)) for line in text.splitlines()]
        for text, value in (
            (ours, lambda row: row["predictions"][0]["probability"]),
            (theirs, lambda row: row["probabilities"][0]),
        )
    )
    difference = float(np.abs(np.array(first) - np.array(other)).max())
    if difference > 1e-3:
        sys.exit(f"predict.py: probabilities differ by {difference:.1e}: nothing is compared")


if __name__ == "__main__":
    main()
