"""The course of a training run as a picture: its loss, and its accuracy on the evaluation split.

Command: python benchmarks/curve.py RUN --figure=docs/cifar10_small.png

RUN is the workdir of a run of `train.py`. Prints a line for each evaluation.
"""

import argparse
from pathlib import Path

import numpy as np

from cait_jax.train.metrics import read_metrics

_WINDOW = 20  # logged steps that a point of the smooth line averages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, help="workdir of a run")
    parser.add_argument("--figure", type=Path, required=True, help="where to write the picture")
    args = parser.parse_args()
    rows = read_metrics(args.run / "metrics.jsonl")
    if not rows:
        raise SystemExit(f"{args.run} holds no metrics.jsonl of a run")
    trained = np.array([(row["step"], row["train/loss"]) for row in rows if "train/loss" in row])
    evaluated = [row for row in rows if "eval/accuracy" in row]
    for row in evaluated:
        minutes = (row["time"] - rows[0]["time"]) / 60
        print(
            f"step {row['step']:6}  {minutes:5.1f} min  loss {row['eval/loss']:.4f}  "
            f"accuracy {row['eval/accuracy']:.4f}"
        )
    draw(trained, evaluated).savefig(args.figure, dpi=120)


def draw(trained: np.ndarray, evaluated: list[dict]):
    """Training loss by step (each logged batch, and their running mean); accuracy by step."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.plot(*trained.T, color="tab:blue", lw=0.6, alpha=0.35)
    window = min(_WINDOW, len(trained))
    smooth = np.convolve(trained[:, 1], np.ones(window) / window, "valid")
    left.plot(trained[window - 1 :, 0], smooth, color="tab:blue", lw=1.5)
    left.set(xlabel="step", ylabel="training loss (nats)")
    steps = [row["step"] for row in evaluated]
    right.plot(steps, [100 * row["eval/accuracy"] for row in evaluated], "o-", ms=3)
    last = evaluated[-1]
    right.annotate(
        f"{100 * last['eval/accuracy']:.2f} %",
        (last["step"], 100 * last["eval/accuracy"]),
        xytext=(0, -14),
        textcoords="offset points",
        ha="right",
        fontsize=9,
    )
    right.set(xlabel="step", ylabel="test accuracy (%)")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
