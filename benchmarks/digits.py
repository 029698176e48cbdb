"""Accuracy of `configs/digits.py`, mean of three seeds, beside scikit-learn's SVC on the same split.

Command: python benchmarks/digits.py [--seeds=3] [--figure=docs/digits.png] [--out=runs/benchmark_digits]

Prints a table and writes OUT/digits.json. A seed whose run is finished under OUT is read, not trained again.
The figure also shows class attention of a longer run with patches of 2x2 pixels, trained for it.
"""

import argparse
import time
from pathlib import Path

import jax
import numpy as np
from reports import write_report
from sklearn.svm import SVC

from cait_jax.augment.pipeline import normalise
from cait_jax.data import load_split
from cait_jax.models.inspect import forward_intermediates
from cait_jax.train import Run, train
from cait_jax.train.metrics import read_metrics
from configs import digits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="seeds to train, from 0 on")
    parser.add_argument("--figure", type=Path, help="where to write the picture")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_digits"))
    args = parser.parse_args()
    out = args.out
    fit, test = (load_split("digits", name, image_size=(8, 8)) for name in ("train", "test"))
    svc = SVC(gamma=0.001).fit(_on_sklearns_scale(fit.images), fit.labels)
    svc_accuracy = float(svc.score(_on_sklearns_scale(test.images), test.labels))

    rows, runs = [], []
    for seed in range(args.seeds):
        config = digits.get_config()
        config.seed = seed
        start = time.perf_counter()
        runs.append(train(config, out / f"seed{seed}"))
        rows.append(
            {
                "seed": seed,
                "accuracy": runs[-1].metrics["eval/accuracy"],
                "loss": runs[-1].metrics["eval/loss"],
                "seconds": time.perf_counter() - start,
            }
        )
    mean = float(np.mean([row["accuracy"] for row in rows]))

    print(f"{'':12} {'accuracy':>9} {'loss':>8} {'seconds':>8}")
    for row in rows:
        name = f"CaiT seed {row['seed']}"
        print(f"{name:12} {row['accuracy']:9.4f} {row['loss']:8.4f} {row['seconds']:8.1f}")
    print(f"{'CaiT mean':12} {mean:9.4f}\n{'SVC':12} {svc_accuracy:9.4f}")
    write_report(
        out / "digits.json",
        cait=rows,
        cait_mean_accuracy=mean,
        svc_accuracy=svc_accuracy,
    )
    if args.figure:
        config = digits.get_config()
        config.model.patch_size = 2
        config.epochs = 400.0
        finer = train(config, out / "patches")
        print(f"{'patches of 2':12} {finer.metrics['eval/accuracy']:9.4f}")
        workdirs = [out / f"seed{seed}" for seed in range(args.seeds)]
        _draw(workdirs, finer, test, svc_accuracy).savefig(args.figure, dpi=120)


def _on_sklearns_scale(images: np.ndarray) -> np.ndarray:
    """Pixels from 0 to 16, as `load_digits` gives them; 255 / 16 apart, so rounding restores them."""
    return np.round(images.reshape(len(images), -1) * (16 / 255))


def _draw(workdirs: list[Path], run: Run, test, svc_accuracy: float):
    """Test accuracy over training; test images above the class attention of `run`."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(12, 2.5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=[1, 2.4])
    axes = left.subplots()
    for seed, workdir in enumerate(workdirs):
        curve = [
            (row["step"], row["eval/accuracy"])
            for row in read_metrics(workdir / "metrics.jsonl")
            if "eval/accuracy" in row
        ]
        axes.plot(*np.transpose(curve), label=f"CaiT, seed {seed}", lw=1.2)
    axes.axhline(svc_accuracy, color="black", ls="--", lw=1, label="SVC(gamma=0.001)")
    axes.set(xlabel="step", ylabel="test accuracy", ylim=(0.9, 1.0))
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)

    images = np.concatenate([test.images[test.labels == digit][:1] for digit in range(10)])
    logits, inside = forward_intermediates(
        run.model, {"params": run.state.params}, normalise(images, (0.5,), (0.5,))
    )
    side = run.model.image_size[0] // run.model.patch_size
    attention = np.asarray(inside["blocks_token_only"]["softmax"])[:, :, :, 0, 1:].mean((0, 2))
    grid = right.subplots(2, 10, gridspec_kw={"hspace": 0.0})
    for i, (above, below) in enumerate(grid.T):
        above.imshow(images[i, ..., 0], cmap="gray_r")
        probability = jax.nn.softmax(logits[i]).max()
        above.set_title(f"{int(logits[i].argmax())}  {probability:.1%}", fontsize=9)
        below.imshow(attention[i].reshape(side, side), cmap="magma", vmin=0)
    for axes in grid.flat:
        axes.axis("off")
    right.suptitle("test images, predictions, and what the class token attends to", fontsize=10)
    return figure


if __name__ == "__main__":
    main()
