"""Class attention of a trained CaiT on test images, beside a screenshot of `cait report`: README.md's picture.

Command: python benchmarks/class_attention.py --run=runs/cifar10-small --data-dir=DIR [--screenshot=report.png]
  [--output=docs/class_attention.png]

For each of six classes the first test image that the network gets right, and what the class token reads of it in
each head of the first class-attention block. The screenshot, if there is one, is put on the right as it is.
"""

import argparse
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np

import cait_jax
from cait_jax.data import load_split
from cait_jax.explain import attention

CLASSES = ("airplane", "bird", "cat", "deer", "horse", "ship")


def first_right(model, variables, prepare, split, classes):
    """The index of the first image of each class that is classified right, and its probability."""
    names = list(split.class_names)
    predict = jax.jit(lambda images: jax.nn.softmax(model.apply(variables, images)))
    found = {}
    for start in range(0, len(split), 100):
        rows = slice(start, start + 100)
        probabilities = np.asarray(predict(prepare(split.images[rows])))
        for row, (label, values) in enumerate(zip(split.labels[rows], probabilities, strict=True)):
            name = names[label]
            if name in classes and name not in found and values.argmax() == label:
                found[name] = start + row, float(values[label])
        if len(found) == len(classes):
            break
    return [(name, *found[name]) for name in classes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", required=True)
    parser.add_argument("--data-dir")
    parser.add_argument("--screenshot", type=Path)
    parser.add_argument("--output", type=Path, default=Path("docs/class_attention.png"))
    args = parser.parse_args()

    model, variables = cait_jax.load_pretrained(args.run)
    preprocessing = cait_jax.preprocessing(args.run)
    mean, std = (
        np.asarray(values, np.float32) for values in (preprocessing.mean, preprocessing.std)
    )
    split = load_split(
        "cifar10", "test", image_size=tuple(model.image_size), data_dir=args.data_dir
    )

    def prepare(images):
        return (images / np.float32(255) - mean) / std

    chosen = first_right(model, variables, prepare, split, CLASSES)
    images = split.images[np.array([index for _, index, _ in chosen])]
    _, inside = cait_jax.forward_intermediates(model, variables, prepare(images))
    maps = np.asarray(attention.class_token_maps(model, inside))[0]  # (batch, heads, rows, columns)
    heads = maps.shape[1]

    columns, rows = 2, len(chosen) // 2
    width = columns * (heads + 1)
    shot = plt.imread(args.screenshot) if args.screenshot else np.zeros((1, 0, 3))
    wide = 1.05 * rows * shot.shape[1] / shot.shape[0]  # of a screenshot as high as the maps
    figure = plt.figure(figsize=(width + wide, rows * 1.05), dpi=160)
    parts = figure.subfigures(
        1, 2 if wide else 1, width_ratios=[width, wide] if wide else [1], squeeze=False
    )[0]
    grid = parts[0].subplots(rows, width)
    parts[0].subplots_adjust(0.01, 0.01, 0.99, 0.94, wspace=0.06, hspace=0.2)
    for number, (image, of_image, (name, _, probability)) in enumerate(
        zip(images, maps, chosen, strict=True)
    ):
        row, column = divmod(number, columns)
        axes = grid[row][column * (heads + 1) :][: heads + 1]
        axes[0].imshow(image, interpolation="bilinear")
        axes[0].set_title(f"{name} {probability:.0%}", fontsize=6, pad=2)
        for head, (axis, values) in enumerate(zip(axes[1:], of_image, strict=True)):
            axis.imshow(values, vmin=0, vmax=values.max(), cmap="viridis")
            axis.set_title(f"head {head}" if row == 0 else "", fontsize=6, pad=2)
        for axis in axes:
            axis.set(xticks=[], yticks=[])
    if wide:
        axis = parts[1].add_axes((0.02, 0.0, 0.98, 1.0))
        axis.imshow(shot)
        axis.axis("off")
    figure.savefig(args.output, metadata={"Software": None}, pil_kwargs={"optimize": True})
    print(args.output, [(name, index) for name, index, _ in chosen])


if __name__ == "__main__":
    main()
