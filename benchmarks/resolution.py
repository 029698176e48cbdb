"""One model at other resolutions than its own, before and after fine-tuning at the highest.

Command: python benchmarks/resolution.py --run=RUN --data-dir=DIR [--sides 32 40 48] [--epochs=1]
    [--learning-rate=1e-4] [--out=runs/benchmark_resolution]

RUN is a finished run of `configs/cifar10.py:small`. Test images are resized as in its evaluation (Pillow's
bicubic), positions as by `load_pretrained`. Fine-tuning is that config at the last side, from RUN's weights.

Prints a table and writes OUT/resolution.json. A fine-tuning that is finished under OUT is read, not made again.
"""

import argparse
import time
from pathlib import Path

from reports import write_report

from cait_jax import load_pretrained, preprocessing
from cait_jax.data import load_split
from cait_jax.evaluation.scores import score
from cait_jax.train import train
from cait_jax.weights.pretrained import load_settings
from configs import cifar10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, help="workdir of a finished run")
    parser.add_argument("--data-dir", required=True, help="where TFDS's cifar10 lies")
    parser.add_argument("--sides", type=int, nargs="+", default=[32, 40, 48], help="in pixels")
    parser.add_argument("--epochs", type=float, default=1.0, help="of fine-tuning")
    parser.add_argument("--learning-rate", type=float, default=1e-4, help="its peak")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_resolution"))
    args = parser.parse_args()

    def top1(run: Path) -> list[float]:
        """Accuracies of a run's weights at every side."""
        found = []
        for side in args.sides:
            model, variables = load_pretrained(run, image_size=side)
            split = load_split("cifar10", "test", image_size=(side, side), data_dir=args.data_dir)
            seen = preprocessing(str(run), image_size=side)
            names = load_settings(run).label_names
            scores = score(model, variables, split, seen, batch_size=200, class_names=names)
            found.append(scores.top1)
            print(f"{run} at {side} pixels: {found[-1]:.4f}", flush=True)
        return found

    config = cifar10.get_config("small")
    config.image_size = args.sides[-1]
    config.data.data_dir = args.data_dir
    config.init.weights = str(args.run)
    config.epochs = args.epochs
    config.eval.every_epochs = args.epochs
    config.eval.batch_size = 200
    # As much of the image as pad_crop leaves at 32 pixels.
    config.augment.pad_crop = 0
    config.augment.scale = (0.75, 1.0)
    config.augment.ratio = (1.0, 1.0)
    config.optimizer.learning_rate = args.learning_rate
    config.optimizer.warmup_epochs = args.epochs / 10
    config.optimizer.final_learning_rate = 1e-6

    before = top1(args.run)
    start = time.perf_counter()
    finetuned = args.out / f"at{args.sides[-1]}"
    train(config, finetuned)
    seconds = time.perf_counter() - start
    after = top1(finetuned)

    print("\n| | " + " | ".join(f"{side} px" for side in args.sides) + " |")
    print("|---" * (len(args.sides) + 1) + "|")
    for name, found in (("as trained", before), (f"fine-tuned at {args.sides[-1]} px", after)):
        print(f"| {name} | " + " | ".join(f"{100 * value:.1f}" for value in found) + " |")
    write_report(
        args.out / "resolution.json",
        sides=args.sides,
        before=before,
        after=after,
        epochs=args.epochs,
        seconds=seconds,
    )


if __name__ == "__main__":
    main()
