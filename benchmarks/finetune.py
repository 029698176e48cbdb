"""What the ways of `cait finetune` are worth on few photographs: accuracy and time by the number of images.

Command: python benchmarks/finetune.py PHOTOGRAPHS --model=DIR [--image-size=112] [--sizes 20 100 250] [--seeds=3]
    [--ways head two-phase all] [--choose] [--report] [--out=runs/finetune]

PHOTOGRAPHS has folders train and val. So many images a class are drawn from train for each seed, and all of val is
measured after the last step. With --choose images of train that were not drawn are measured instead, at most 50
a class, so that settings can be chosen without val. A way is `cait finetune --what WAY` at its defaults.

A run is a line of benchmarks/studies/results/finetune.jsonl and is not made again; prints a table.
"""

import argparse
import collections
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from reports import RESULTS, append_line, read_lines
from tabulate import tabulate

from cait_jax.cores import use_cores
from cait_jax.data.image_files import find_images
from cait_jax.train import train
from cait_jax.train.finetune import folder_config, look_through
from cait_jax.train.head import fit_on_folder
from cait_jax.weights.pretrained import load_pretrained, preprocessing

LINES = RESULTS / "finetune.jsonl"
_KEY = ("way", "size", "seed", "measured on", "pixels", "defaults")
_MOST_CHOSEN = 50  # images a class with --choose


def write_folder(photographs: Path, folder: Path, size: int, seed: int, *, choose: bool) -> None:
    """Links to the images of a run: folders train and val."""
    shutil.rmtree(folder, ignore_errors=True)
    for number, source in enumerate(sorted((photographs / "train").iterdir())):
        files = sorted(find_images([str(source)]).paths)
        order = np.random.default_rng((seed, number)).permutation(len(files))
        rest = [files[i] for i in order[size:][:_MOST_CHOSEN]]
        held_out = rest if choose else find_images([str(photographs / "val" / source.name)]).paths
        for side, chosen in (("train", [files[i] for i in order[:size]]), ("val", held_out)):
            target = folder / side / source.name
            target.mkdir(parents=True)
            for path in chosen:
                (target / path.name).symlink_to(path.absolute())


def measure(folder: Path, model: str, way: str, workdir: Path, pixels: int, seed: int) -> float:
    """Fine-tunes and gives the accuracy on the folder's val."""
    photographs = look_through(folder)
    if way == "head":
        network, variables = load_pretrained(model, image_size=pixels, num_classes=0)
        prepare = preprocessing(model, image_size=pixels)
        return fit_on_folder(photographs, network, variables, prepare, workdir, seed=seed).accuracy
    config = folder_config(
        photographs, model, what=way, image_size=pixels, seed=seed, devices=jax.device_count()
    )
    config.eval.every_epochs = config.epochs
    return train(config, workdir).metrics["eval/accuracy"]


def table(rows: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds, in percent, and the median of seconds."""
    found = collections.defaultdict(list)
    for row in rows:
        found[row["defaults"], row["way"], row["measured on"], row["size"]].append(row)
    lines = [
        {
            "defaults": defaults, "way": way, "measured on": where, "images a class": size,
            "accuracy (%)": f"{100 * np.mean(values):.1f} ± {100 * np.std(values, ddof=1):.1f}"
            if len(values := [row["accuracy"] for row in runs]) > 1
            else f"{100 * values[0]:.1f}",
            "seeds": len(runs),
            "seconds": f"{np.median([row['seconds'] for row in runs]):.0f}",
        }
        for (defaults, way, where, size), runs in sorted(found.items())
    ]  # fmt: skip
    return tabulate(lines, headers="keys", tablefmt="github", disable_numparse=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("photographs", type=Path)
    parser.add_argument("--model", required=True, help="a saved model or a name of `cait models`")
    parser.add_argument("--image-size", type=int, default=112)
    parser.add_argument("--sizes", type=int, nargs="+", default=[20, 100, 250])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", default=["head", "two-phase", "all"])
    parser.add_argument("--choose", action="store_true", help="measure on images of train")
    parser.add_argument(
        "--defaults",
        default=time.strftime("%Y-%m-%d"),
        help="a name for the code's defaults, by date",
    )
    parser.add_argument("--report", action="store_true", help="print the table, run nothing")
    parser.add_argument("--out", type=Path, default=Path("runs/finetune"))
    args = parser.parse_args()
    use_cores()
    where = "train" if args.choose else "val"
    runs = [
        (way, size, seed, where, args.image_size, args.defaults)
        for size in args.sizes
        for way in args.ways
        for seed in range(args.seeds)
    ]
    for run in runs:
        if args.report or run in {tuple(row[name] for name in _KEY) for row in read_lines(LINES)}:
            continue
        way, size, seed, *_ = run
        folder = args.out / "_".join(map(str, run))
        if not folder.exists():
            write_folder(args.photographs, folder, size, seed, choose=args.choose)
        start = time.perf_counter()
        accuracy = measure(
            folder.absolute(), args.model, way, folder / "run", args.image_size, seed
        )
        seconds = time.perf_counter() - start
        row = {
            **dict(zip(_KEY, run, strict=True)), "accuracy": accuracy, "seconds": round(seconds, 1),
            "devices": jax.device_count(), "date": time.strftime("%Y-%m-%d"),
        }  # fmt: skip
        append_line(LINES, row)
        print(row, flush=True)
    print("\n" + table(read_lines(LINES)))


if __name__ == "__main__":
    main()
