"""What the paper's choices are worth, at a size that two CPU cores train in minutes.

Command: python benchmarks/study.py NAME --data_dir=DIR [--seeds=3] [--arms=A,B] [--out=runs/study] [--report]
                                         [--figure=PNG]

NAME is one of

    residual     residual schemes at depths 12, 24 and 36 (the paper's table 1)
    class_token  where the class token reads the patches (its table 3)
    heads        2, 4 and 8 heads, with and without talking heads

Each run is a training on CIFAR-10 (TFDS `cifar10` under DIR) through `cait_jax.train.train`: width 64, patches of
8 pixels (16 tokens), 3 passes over the 50,000 images in batches of 128, shifted crops and mirror images, AdamW at
1e-3 with a cosine; nothing is chosen by the test images. All arms of a study have the same steps.

A finished run is a line of benchmarks/studies/NAME.jsonl and is not trained again; one that was stopped goes on
from its checkpoint under OUT. Several commands with other `--arms` may run at a time. `--report` trains nothing
and prints the table: mean and standard deviation over seeds.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from tabulate import tabulate

from cait_jax.train import NonFiniteError, train
from cait_jax.train.resume import read_metrics
from configs import cifar10

RESULTS = Path(__file__).parent / "studies"
STEPS = 1170
_LAST = 100  # steps whose mean is a run's training loss


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name, each with the keys of `model` in which it differs from the others."""

    question: str
    arms: Mapping[str, Mapping[str, Any]]


def layer_scale_init(depth: int) -> float:
    """The paper's rule (section 2)."""
    return 0.1 if depth <= 18 else 1e-5 if depth <= 24 else 1e-6


RESIDUAL = {
    f"{scheme} {depth}": {
        "depth": depth,
        "residual": scheme,
        "layer_scale_init": layer_scale_init(depth) if scheme in ("layerscale", "scalar") else None,
    }
    for depth in (12, 24, 36)
    for scheme in ("plain", "rezero", "fixup", "t_fixup", "scalar", "layerscale")
}
# Ten blocks each.
CLASS_TOKEN = {
    "mean": {"depth": 10, "class_token": "mean"},
    "input": {"depth": 10, "class_token": "input"},
    **{f"block {k}": {"depth": 10, "class_token": k} for k in (4, 8)},
    **{
        f"class attention {count}": {"depth": 10 - count, "class_depth": count}
        for count in (1, 2, 4)
    },
}
HEADS = {
    f"{heads} {'talking ' * talks}heads": {"depth": 8, "num_heads": heads, "talking_heads": talks}
    for heads in (2, 4, 8)
    for talks in (False, True)
}
STUDIES = {
    "residual": Study("does LayerScale lead as depth grows?", RESIDUAL),
    "class_token": Study("where should the class token read the patches?", CLASS_TOKEN),
    "heads": Study("what are talking heads worth, and how many?", HEADS),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES, metavar="NAME")
    parser.add_argument("--data_dir", help="where TFDS's cifar10 is")
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on")
    parser.add_argument("--arms", help="some of the arms, by commas; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", action="store_true", help="print the table and train nothing")
    parser.add_argument("--figure", type=Path, help="where to write the picture")
    args = parser.parse_args()
    study = STUDIES[args.study]
    arms = args.arms.split(",") if args.arms else list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        parser.error(f"--arms: no {', '.join(unknown)}; there are {', '.join(study.arms)}")
    if not (args.report or args.data_dir):
        parser.error("--data_dir: say where TFDS's cifar10 is")
    results = RESULTS / f"{args.study}.jsonl"
    if not args.report:
        for seed in range(args.seeds):
            for arm in arms:
                if (arm, seed) in finished(results):
                    continue
                found = run(study.arms[arm], seed, args.data_dir, args.out / args.study / arm)
                if found is None:  # stopped by a signal
                    return
                append(results, {"arm": arm, "seed": seed, **found})
    found = finished(results)
    print(table(study, found, args.seeds))
    if args.figure:
        draw(study, found).savefig(args.figure, dpi=120)


def run(
    changes: Mapping[str, Any], seed: int, data_dir: str, folder: Path, steps: int = STEPS
) -> dict[str, Any] | None:
    """Trains an arm, or goes on with it; what is kept of it. None if it was stopped."""
    config = cifar10.get_config("small")
    config.seed = seed
    config.steps = steps
    config.batch_size = 128
    config.data.data_dir = data_dir
    config.model.update(width=64, num_heads=4, patch_size=8, stacked=True)
    config.model.update(changes)
    config.optimizer.warmup_epochs = 0.3
    config.eval.every_epochs = 1e9  # the last step is evaluated
    config.checkpoint.every_steps = 200
    config.report.every_steps = 10
    workdir = folder / f"seed{seed}"
    try:
        done = train(config, workdir)
    except NonFiniteError:
        done = None
    if done is not None and not done.finished:
        return None
    rows = [row for row in read_metrics(workdir / "metrics.jsonl") if "train/loss" in row]
    last = [row["train/loss"] for row in rows if row["step"] > steps - _LAST]
    first, final = rows[0], rows[-1]
    return {
        "diverged": done is None,
        "accuracy": None if done is None else done.metrics["eval/accuracy"],
        "eval_loss": None if done is None else done.metrics["eval/loss"],
        "train_loss": None if done is None else statistics.mean(last),
        "grad_norm": statistics.median(row["train/grad_norm"] for row in rows),
        "parameters": done and sum(leaf.size for leaf in jax.tree.leaves(done.state.params)),
        "steps": final["step"],
        "seconds_a_step": (final["time"] - first["time"]) / (final["step"] - first["step"]),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
    }


def append(results: Path, line: Mapping[str, Any]) -> None:
    """One write, so that commands at a time do not mix their lines."""
    with results.open("a") as file:
        file.write(json.dumps(line) + "\n")


def finished(results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of a study by arm and seed."""
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["arm"], row["seed"]): row for row in rows}


def table(study: Study, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> str:
    """In Markdown, with the runs that are missing below."""
    rows = []
    for arm in study.arms:
        runs = [found[arm, seed] for seed in range(seeds) if (arm, seed) in found]
        if not runs:
            continue
        sound = [row for row in runs if not row["diverged"]]
        rows.append(
            [
                arm,
                f"{runs[0]['parameters'] or 0:,}",
                _mean([100 * row["accuracy"] for row in sound], 1),
                _mean([row["eval_loss"] for row in sound], 3),
                _mean([row["train_loss"] for row in sound], 3),
                _mean([row["grad_norm"] for row in runs], 2),
                sum(row["diverged"] for row in runs),
                len(runs),
            ]
        )
    headers = ["arm", "parameters", "test accuracy (%)", "test loss", "training loss", "gradient norm",
               "diverged", "seeds"]  # fmt: skip
    lines = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    missing = [
        f"{arm}, seed {seed}"
        for arm in study.arms
        for seed in range(seeds)
        if (arm, seed) not in found
    ]
    return lines + (f"\nmissing: {'; '.join(missing)}" if missing else "")


def _mean(values: list[float], digits: int) -> str:
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def draw(study: Study, found: Mapping[tuple[str, int], Mapping[str, Any]]):
    """A point for each run, and each arm's mean."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    arms = [arm for arm in study.arms if any(name == arm for name, _ in found)]
    figure, axes = plt.subplots(figsize=(7, 0.8 + 0.28 * len(arms)), layout="constrained")
    for height, arm in enumerate(arms):
        runs = [row for (name, _), row in found.items() if name == arm and not row["diverged"]]
        values = [100 * row["accuracy"] for row in runs]
        axes.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.5, ms=5)
        if values:
            axes.plot(statistics.mean(values), height, "|", color="black", ms=12)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="test accuracy (%)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
