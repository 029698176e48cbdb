"""What pre-training is worth: two classes of CIFAR-10 from few images, fine-tuned and from scratch.

Command: python benchmarks/transfer.py --data-dir=DIR [--minutes=20] [--seeds=3] [--sizes 50 200 1000]
    [--held-out cat dog] [--figure=docs/transfer.png] [--out=runs/benchmark_transfer]

The network of `configs/cifar10.py:small` learns the other eight classes, for as many steps as a short run says fit
in the minutes. Of the two held-out classes a folder of PNGs is written with so many images a class, drawn anew
for each seed, and their 2,000 test images beside it. From there it is `cait finetune`'s own recipe
(`cait_jax.train.finetune`): the whole network, the head alone, the two phases, of which the first trains the head
here, for a quarter of the epochs, and does not fit it. From scratch is the whole
network without the weights, all layers at one rate of 1e-3. All four see crops of at least 0.35 of the area and
mirror images, and equally many epochs; nothing is chosen by the test images.

Prints a table and writes OUT/transfer.json. What is finished under OUT is read, not trained again.
"""

import argparse
import collections
import time
from pathlib import Path

import cv2
import jax
import numpy as np
from ml_collections import ConfigDict
from reports import write_report

from cait_jax.data import load_split
from cait_jax.data.split import InMemory
from cait_jax.train import Run, train
from cait_jax.train.finetune import folder_config, look_through
from cait_jax.train.metrics import read_metrics
from configs import cifar10

WAYS = ("from scratch", "head", "two-phase", "all")
# Passes over the images, by their number a class: few images need many.
EPOCHS = {50: 30.0, 200: 15.0, 1000: 6.0}
_TIMED_STEPS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", required=True, help="where TFDS's cifar10 lies")
    parser.add_argument("--minutes", type=float, default=20.0, help="of pre-training")
    parser.add_argument("--seeds", type=int, default=3, help="draws of the images, from 0 on")
    parser.add_argument(
        "--sizes", type=int, nargs="+", default=[50, 200, 1000], help="images a class"
    )
    parser.add_argument("--held-out", nargs=2, default=["cat", "dog"], metavar="CLASS")
    parser.add_argument("--figure", type=Path, help="where to write the picture")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_transfer"))
    args = parser.parse_args()
    out = args.out.absolute()

    train_split, test_split = (
        load_split("cifar10", split, image_size=(32, 32), data_dir=args.data_dir)
        for split in ("train", "test")
    )
    others = [name for name in train_split.class_names if name not in args.held_out]
    for side, split in (("train", train_split), ("val", test_split)):
        write_folder(split, out / "others" / side, others)
    write_folder(test_split, out / "test", args.held_out)

    pretraining = out / "pretraining"
    run = pretrain(out, pretraining, args.minutes)
    print(f"eight classes: test accuracy {run.metrics['eval/accuracy']:.4f}")

    rows = []
    for size in args.sizes:
        for seed in range(args.seeds):
            photographs = out / f"{size}_seed{seed}"
            write_folder(train_split, photographs / "train", args.held_out, size, seed)
            if not (photographs / "val").exists():
                (photographs / "val").symlink_to(out / "test", target_is_directory=True)
            for way in WAYS:
                config = recipe(photographs, pretraining, way, size, seed)
                workdir = out / "runs" / f"{size}_seed{seed}_{way.replace(' ', '_')}"
                start = time.perf_counter()
                accuracy = train(config, workdir).metrics["eval/accuracy"]
                seconds = time.perf_counter() - start
                rows.append(
                    {
                        "size": size,
                        "seed": seed,
                        "way": way,
                        "accuracy": accuracy,
                        "seconds": seconds,
                    }
                )
                print(f"{size:5} a class, seed {seed}, {way:13} {accuracy:.4f}", flush=True)

    print("\n" + table(rows))
    write_report(
        out / "transfer.json",
        held_out=args.held_out,
        pretraining_steps=run.state.step.item(),
        pretraining_accuracy=run.metrics["eval/accuracy"],
        rows=rows,
    )
    if args.figure:
        draw(rows, args.held_out).savefig(args.figure, dpi=120)


def write_folder(
    split: InMemory, folder: Path, classes: list[str], size: int | None = None, seed: int = 0
) -> None:
    """Writes images of some classes as PNGs, one folder a class: all, or `size` of each drawn by the seed."""
    for name in classes:
        target = folder / name
        if target.exists():
            continue
        label = split.class_names.index(name)
        chosen = np.flatnonzero(split.labels == label)
        if size is not None:
            chosen = np.sort(np.random.default_rng((seed, label)).permutation(chosen)[:size])
        partial = folder / f".{name}"
        partial.mkdir(parents=True, exist_ok=True)
        for index in chosen:
            cv2.imwrite(str(partial / f"{index:05}.png"), split.images[index][..., ::-1])
        partial.rename(target)


def pretrain(out: Path, workdir: Path, minutes: float) -> Run:
    """Trains on the eight classes for about so many minutes, and stops where the schedule ends."""
    config = cifar10.get_config("small")
    config.data.name = str(out / "others")
    config.data.eval_split = "val"
    _see_alike(config)
    config.checkpoint.every_steps = 500
    noted = out / "pretraining_steps"
    if not noted.exists():
        config.steps = 2 * _TIMED_STEPS
        train(config, out / "timing")
        times = {
            row["step"]: row["train/images_per_second"]
            for row in read_metrics(out / "timing" / "metrics.jsonl")
            if "train/images_per_second" in row
        }
        rate = float(np.median([value for step, value in times.items() if step > _TIMED_STEPS]))
        noted.write_text(str(round(60 * minutes * rate / config.batch_size)))
    config.steps = int(noted.read_text())
    return train(config, workdir)


def recipe(photographs: Path, pretraining: Path, way: str, size: int, seed: int) -> ConfigDict:
    """`cait finetune`'s config for a folder; or that of the same network from scratch."""
    config = folder_config(
        look_through(photographs),
        str(pretraining),
        what="all" if way == "from scratch" else way,
        epochs=EPOCHS.get(size),
        batch_size=32,
        seed=seed,
        devices=jax.device_count(),
    )
    _see_alike(config)
    config.model.stacked = False
    config.data.workers = 0
    config.eval.every_epochs = config.epochs
    config.eval.batch_size = 200
    if way == "two-phase":
        config.init.fit_head, config.optimizer.train = False, "all"
        config.phases.head_epochs = config.epochs / 4
        config.phases.blocks_epochs = 3 * config.epochs / 4
    if way == "from scratch":
        config.init.weights = None
        config.init.reset_head = False
        config.optimizer.learning_rate = 1e-3
        config.optimizer.reference_batch = 0
        config.optimizer.layer_decay = 1.0
    return config


def _see_alike(config: ConfigDict) -> None:
    config.augment.scale = (0.35, 1.0)
    config.augment.pad_crop = 0
    config.augment.rand_augment = ""
    config.augment.reprob = config.augment.mixup = config.augment.cutmix = 0.0


def by_way(rows: list[dict]) -> dict[tuple[str, int], np.ndarray]:
    """The accuracies of all seeds, by (way, size)."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["way"], row["size"]].append(row["accuracy"])
    return {key: np.array(values) for key, values in found.items()}


def table(rows: list[dict]) -> str:
    """A table in Markdown: mean and standard deviation over the seeds, in percent."""
    sizes = sorted({row["size"] for row in rows})
    found = by_way(rows)
    lines = ["| images a class | " + " | ".join(WAYS) + " |", "|---" * (len(WAYS) + 1) + "|"]
    for size in sizes:
        cells = [
            f"{100 * found[way, size].mean():.1f} ± {100 * found[way, size].std():.1f}"
            for way in WAYS
        ]
        lines.append(f"| {size:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], held_out: list[str]):
    """Accuracy by the number of images: a line through the means, a dot for each seed."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    sizes = sorted({row["size"] for row in rows})
    found = by_way(rows)
    figure, axes = plt.subplots(figsize=(6, 3.8), layout="constrained")
    for way in WAYS:
        (line,) = axes.plot(
            sizes, [100 * found[way, size].mean() for size in sizes], label=way, lw=1.5
        )
        for size in sizes:
            values = 100 * found[way, size]
            axes.plot([size] * len(values), values, "o", ms=3, color=line.get_color())
    axes.axhline(50, color="black", ls="--", lw=0.8)
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    axes.minorticks_off()
    axes.set(
        xlabel="training images a class",
        ylabel="test accuracy (%)",
        title=f"{held_out[0]} or {held_out[1]}",
    )
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


if __name__ == "__main__":
    main()
