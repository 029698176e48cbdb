"""What the paper's choices, pre-training and optimisers are worth, at a size that two CPU cores train in minutes.

Command: python benchmarks/study.py NAME --data_dir=DIR [--seeds=3] [--arms=A;B] [--out=runs/study] [--report]
                                         [--figure=PNG]

NAME is one of

    residual     residual schemes at depths 12, 24 and 36 (the paper's table 1)
    class_token  where the class token reads the patches (its table 3)
    heads        2, 4 and 8 heads, with and without talking heads
    pretraining  MAE and DINO, then 1, 10 and 100 % of the labels, at equal total time (studies/pretraining.py)
    regime       500 to 50,000 images: from scratch, after MAE, and a residual CNN (studies/regime.py)
    optimizers   optimisers and rates for an hour on two cores (studies/optimizers.py)

Each run is a training on CIFAR-10 (TFDS `cifar10` under DIR) through `cait_jax.train.train`. In the first
three: width 64, patches of 8 pixels (16 tokens), 3 passes over the 50,000 images in batches of 128, shifted
crops and mirror images, AdamW at 1e-3 with a cosine. All arms of a study have the same steps, but where its
file says otherwise; nothing is chosen by the test images.

A finished run is a line of benchmarks/studies/results/NAME.jsonl and is not trained again; one that was stopped
goes on from its checkpoint under OUT. Several commands with other `--arms` may run at a time. `--report` trains
nothing and prints the table: mean and standard deviation over seeds.
"""

import argparse
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from reports import RESULTS, append_line, read_lines
from studies.architecture import CLASS_TOKEN, HEADS, RESIDUAL
from studies.optimizers import OPTIMIZERS
from studies.pretraining import PRETRAINING
from studies.regime import REGIME
from studies.runs import Job, Study
from tabulate import tabulate

STUDIES = {
    "residual": RESIDUAL,
    "class_token": CLASS_TOKEN,
    "heads": HEADS,
    "pretraining": PRETRAINING,
    "regime": REGIME,
    "optimizers": OPTIMIZERS,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES, metavar="NAME")
    parser.add_argument("--data_dir", help="where TFDS's cifar10 is")
    parser.add_argument("--seeds", type=int, default=3, help="from 0 on")
    parser.add_argument("--arms", help="some of the arms, by semicolons; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--report", action="store_true", help="print the table and train nothing")
    parser.add_argument("--figure", type=Path, help="where to write the picture")
    args = parser.parse_args()
    study = STUDIES[args.study]
    arms = args.arms.split(";") if args.arms else list(study.arms)
    if unknown := [arm for arm in arms if arm not in study.arms]:
        parser.error(f"--arms: no {'; '.join(unknown)}; there are {'; '.join(study.arms)}")
    if not (args.report or args.data_dir):
        parser.error("--data_dir: say where TFDS's cifar10 is")
    results = RESULTS / f"{args.study}.jsonl"
    if not args.report:
        for seed in range(args.seeds):
            for name in arms:
                arm = study.arms[name]
                if (name, seed) in finished(results) or (arm.seeds and seed >= arm.seeds):
                    continue
                found = arm.run(Job(args.data_dir, args.out.absolute() / args.study, name, seed))
                if found is None:  # stopped by a signal
                    return
                append_line(results, {"arm": name, "seed": seed, **found})
    lines = finished(results)
    print(table(study, lines, args.seeds))
    if args.figure:
        draw(study, lines).savefig(args.figure, dpi=120)


def finished(results: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The lines of a study by arm and seed."""
    return {(row["arm"], row["seed"]): row for row in read_lines(results)}


def table(study: Study, found: Mapping[tuple[str, int], Mapping[str, Any]], seeds: int) -> str:
    """In Markdown, with the runs that are missing below."""
    headers = {
        "accuracy": ("accuracy (%)", 100, 1),
        "eval_loss": ("loss", 1, 3),
        "train_loss": ("training loss", 1, 3),
        "grad_norm": ("gradient norm", 1, 2),
    }
    rows, missing = [], []
    for name, arm in study.arms.items():
        wanted = range(min(seeds, arm.seeds or seeds))
        runs = [found[name, seed] for seed in wanted if (name, seed) in found]
        missing += [f"{name}, seed {seed}" for seed in wanted if (name, seed) not in found]
        if not runs:
            continue
        row = [name, f"{runs[0].get('parameters') or 0:,}"]
        for key, (_, factor, digits) in headers.items():
            row.append(_mean([factor * r[key] for r in runs if r.get(key) is not None], digits))
        rows.append([*row, sum(r["diverged"] for r in runs), len(runs)])
    titles = [
        "arm",
        "parameters",
        *(title for title, _, _ in headers.values()),
        "diverged",
        "seeds",
    ]
    lines = tabulate(rows, titles, tablefmt="github", disable_numparse=True)
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
        runs = [row for (name, _), row in found.items() if name == arm]
        values = [100 * row["accuracy"] for row in runs if row.get("accuracy") is not None]
        axes.plot(values, [height] * len(values), "o", color="tab:blue", alpha=0.5, ms=5)
        if values:
            axes.plot(statistics.mean(values), height, "|", color="black", ms=12)
    axes.set(yticks=range(len(arms)), yticklabels=arms, xlabel="accuracy (%)")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
