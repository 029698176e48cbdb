"""The course of a training as a picture: its loss, and its accuracy on the evaluation split.

Command: python benchmarks/curve.py RUN [RUN ...] --figure=docs/cifar10_hour.png

RUN is the workdir of a run of `train.py`; several are parts of one training, each started from the one before.
Prints a line for each evaluation. Minutes are those between logged lines, less those in which a run was stopped.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from cait_jax.train.metrics import read_metrics

_WINDOW = 20  # logged steps that a point of the smooth line averages
_STOP = 10  # an interval of so many median ones is a stop


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="workdir of a run")
    parser.add_argument("--figure", type=Path, required=True, help="where to write the picture")
    args = parser.parse_args()
    parts, before = [], 0.0
    for run in args.runs:
        rows = read_metrics(run / "metrics.jsonl")
        if not rows:
            raise SystemExit(f"{run} holds no metrics.jsonl of a run")
        gaps = np.diff([row["time"] for row in rows])
        gaps[gaps > _STOP * np.median(gaps)] = 0.0
        minutes = before + np.concatenate([[0.0], np.cumsum(gaps)]) / 60
        rows = [row | {"minutes": at} for row, at in zip(rows, minutes, strict=True)]
        before = minutes[-1]
        parts.append(rows)
        for row in (row for row in rows if "eval/accuracy" in row):
            print(
                f"{run.name}  step {row['step']:6}  {row['minutes']:5.1f} min  loss {row['eval/loss']:.4f}  "
                f"accuracy {row['eval/accuracy']:.4f}"
            )
    draw(parts).savefig(args.figure, dpi=120)


def draw(parts: list[list[dict[str, Any]]]):
    """Training loss (each logged batch, and their running mean) and accuracy by minutes; a colour a run."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for number, rows in enumerate(parts):
        color = f"C{number}"
        trained = np.array(
            [(row["minutes"], row["train/loss"]) for row in rows if "train/loss" in row]
        )
        left.plot(*trained.T, color=color, lw=0.6, alpha=0.35)
        window = min(_WINDOW, len(trained))
        smooth = np.convolve(trained[:, 1], np.ones(window) / window, "valid")
        left.plot(trained[window - 1 :, 0], smooth, color=color, lw=1.5)
        evaluated = [row for row in rows if "eval/accuracy" in row]
        minutes = [row["minutes"] for row in evaluated]
        accuracies = [100 * row["eval/accuracy"] for row in evaluated]
        right.plot(minutes, accuracies, "o-", ms=3, color=color)
        right.annotate(
            f"{accuracies[-1]:.2f} %",
            (minutes[-1], accuracies[-1]),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=9,
        )
    left.set(xlabel="minutes", ylabel="training loss (nats)")
    right.set(xlabel="minutes", ylabel="test accuracy (%)")
    right.margins(0.1)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
