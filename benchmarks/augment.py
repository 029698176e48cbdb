"""RandAugment on the device against Pillow in the decoding threads, from images to normalised batches.

Command: python benchmarks/augment.py [--rounds=5] [--data_dir=DIR] [--figure=sheet.png]
[--out=runs/benchmark_augment]

At 32 pixels the images are decoded already, as a data set in memory; at 224 they are JPEG files, decoded and
cropped by as many threads as there are cores while the device works on the batch before. "none" augments nothing.
Rounds alternate; the ratio is that of the medians. With DIR, of TFDS data sets, the images are CIFAR-10's and
ImageNet's, else scikit-learn's two photographs. The figure is a contact sheet: rows are operations, columns
magnitudes; the last six rows are draws of the recipes' other parts.
"""

import argparse
import functools
import io
import itertools
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import PIL
from PIL import Image, ImageDraw, ImageEnhance, ImageOps
from reports import write_report

from cait_jax.augment.mixup import Mixup, mix
from cait_jax.augment.pipeline import Augmentation, augment, normalise, random_erase
from cait_jax.augment.randaugment import FILL, OPERATIONS, RandAugment, apply_operation
from cait_jax.data import load_split
from cait_jax.data.decode import center_crop, random_resized_crop

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
BATCH = {32: 512, 224: 64}
COLUMNS = (0.0, -10.0, -5.0, 2.0, 5.0, 9.0)


def with_pillow(image: np.ndarray, rng: np.random.Generator, policy: RandAugment) -> np.ndarray:
    """The same draws as in `cait_jax.augment.randaugment`, made and applied on the host."""
    picture = Image.fromarray(image)
    for _ in range(policy.num_ops):
        operation = OPERATIONS[rng.integers(len(OPERATIONS))]
        applied = rng.random() < policy.prob
        size = min(10.0, max(0.0, rng.normal(policy.magnitude, policy.magnitude_std)))
        sign = 1 if rng.random() < 0.5 else -1
        if applied:
            picture = pillow_operation(picture, operation, sign * size / 10)
    return np.asarray(picture)


def pillow_operation(picture: Image.Image, operation: str, signed: float) -> Image.Image:
    strength = abs(signed)
    width, height = picture.size
    options = {"resample": Image.Resampling.BICUBIC, "fillcolor": FILL}

    def table(function: Callable[[int], int]) -> Image.Image:
        return picture.point([function(level) for level in range(256)] * 3)

    match operation:
        case "auto_contrast":
            return ImageOps.autocontrast(picture)
        case "equalize":
            return ImageOps.equalize(picture)
        case "invert":
            return ImageOps.invert(picture)
        case "posterize":
            return table(lambda level: level & (256 - (1 << (4 + int(4 * strength)))))
        case "solarize":
            return ImageOps.solarize(picture, 256 - int(256 * strength))
        case "solarize_add":
            addend = int(110 * strength)
            return table(lambda level: min(255, level + addend) if level < 128 else level)
        case "rotate":
            return picture.rotate(30 * signed, **options)
        case "color" | "contrast" | "brightness" | "sharpness":
            enhance = getattr(ImageEnhance, operation.capitalize())
            return enhance(picture).enhance(max(0.1, 1 + 0.9 * signed))
    inverse = {
        "shear_x": (1, 0.3 * signed, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, 0.3 * signed, 1, 0),
        "translate_x": (1, 0, 0.45 * signed * width, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, 0.45 * signed * height),
    }[operation]
    return picture.transform(picture.size, Image.Transform.AFFINE, inverse, **options)


def photographs() -> list[np.ndarray]:
    from sklearn.datasets import load_sample_images

    return load_sample_images().images


def encoded(data_dir: str | None) -> list[bytes]:
    """JPEG files: ImageNet's, or the sample photographs at about its size."""
    if data_dir:
        split = load_split("imagenet2012", "train", image_size=(224, 224), data_dir=data_dir)
        return [split.records[i]["image"] for i in range(min(64, len(split)))]
    files = []
    for image in photographs():
        file = io.BytesIO()
        Image.fromarray(image).resize((500, 375)).save(file, "JPEG", quality=92)
        files.append(file.getvalue())
    return files


def small(data_dir: str | None) -> list[np.ndarray]:
    """Images of 32 by 32 pixels: CIFAR-10's, or boxes of the sample photographs."""
    if data_dir:
        split = load_split("cifar10", "train[:512]", image_size=(32, 32), data_dir=data_dir)
        return list(split.images)
    rng = np.random.default_rng(0)
    return [
        random_resized_crop(file, rng, image_size=(32, 32))
        for file, _ in itertools.product(encoded(None), range(64))
    ]


def sides(size: int, data_dir: str | None, pool: ThreadPoolExecutor, batches: int):
    """By name, a function of nothing that makes `batches` normalised batches."""
    count, policy = BATCH[size], RandAugment()
    source = small(data_dir) if size == 32 else encoded(data_dir)

    def read(position: int, host: bool) -> np.ndarray:
        rng = np.random.Generator(np.random.Philox(position))
        image = source[position % len(source)]
        if size != 32:
            image = random_resized_crop(image, rng, image_size=(size, size))
        return with_pillow(image, rng, policy) if host else image

    @functools.partial(jax.jit, static_argnums=3)
    def on_device(key, images, ids, settings):
        return normalise(augment(key, images.astype(jnp.float32), ids, settings), MEAN, STD)

    def run(host: bool, settings: Augmentation) -> None:
        ids, result = jnp.arange(count), None
        for step in range(batches):
            positions = range(step * count, (step + 1) * count)
            if size == 32 and not host:
                images = np.stack([source[position % len(source)] for position in positions])
            else:
                images = np.stack(list(pool.map(lambda p: read(p, host), positions)))
            jax.block_until_ready(result)  # of the batch before
            result = on_device(jax.random.key(step), images, ids, settings)
        jax.block_until_ready(result)

    return {
        "none": lambda: run(False, Augmentation()),
        "host": lambda: run(True, Augmentation()),
        "device": lambda: run(False, Augmentation(rand_augment=policy)),
    }


def measure(size: int, data_dir: str | None, rounds: int, batches: int) -> dict:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        functions = sides(size, data_dir, pool, batches)
        seconds: dict[str, list[float]] = {name: [] for name in functions}
        for function in functions.values():  # compiles
            function()
        for _ in range(rounds):
            for name, function in functions.items():
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    images = batches * BATCH[size]
    rates = {name: images / statistics.median(times) for name, times in seconds.items()}
    return {
        "images": images,
        "seconds": seconds,
        "images_per_second": rates,
        "device_over_host": rates["device"] / rates["host"],
    }


def contact_sheet(path: Path, data_dir: str | None) -> None:
    """Every operation at several magnitudes, then draws of the recipes."""
    side, margin, label = 112, 4, 120
    files = encoded(data_dir)
    pair = [center_crop(file, image_size=(side, side)) for file in (files[0], files[-1])]
    image, many = jnp.asarray(pair[0]), len(COLUMNS)
    jitted = jax.jit(apply_operation)
    rows = {
        name: [image, *(jitted(image, i, magnitude) for magnitude in COLUMNS[1:])]
        for i, name in enumerate(OPERATIONS)
    }
    batch = jnp.stack([jnp.asarray(pair[i % 2]) for i in range(many)]).astype(jnp.float32)
    ids, key = jnp.arange(many), jax.random.key(0)
    rows["RandAugment"] = augment(key, batch, ids, Augmentation(rand_augment=RandAugment()))
    rows["three_augment"] = augment(key, batch, ids, Augmentation(three_augment=True))
    rows["color_jitter 0.3"] = augment(key, batch, ids, Augmentation(color_jitter=0.3))
    erased = random_erase(key, normalise(batch, MEAN, STD), ids, 1.0)
    rows["random_erase"] = 255 * (erased * jnp.array([[[STD]]]) + jnp.array([[[MEAN]]]))
    for name, settings in (("mixup", Mixup(mixup_alpha=0.8)), ("cutmix", Mixup(cutmix_alpha=1.0))):
        rows[name] = [
            mix(jax.random.key(i), batch[:2], jnp.eye(2), settings)[0][0] for i in range(many)
        ]

    step = side + margin
    sheet = Image.new("RGB", (label + step * many, 24 + step * len(rows)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, magnitude in enumerate(COLUMNS):
        text = f"magnitude {magnitude:g}" if magnitude else "original"
        draw.text((label + column * step, 6), text, fill="black")
    for row, (name, images) in enumerate(rows.items()):
        draw.text((margin, 24 + row * step + side // 2), name, fill="black")
        for column, cell in enumerate(images):
            levels = np.clip(np.round(np.asarray(cell)), 0, 255).astype(np.uint8)
            sheet.paste(Image.fromarray(levels), (label + column * step, 24 + row * step))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--batches", type=int, default=4, help="batches of one measurement")
    parser.add_argument("--data_dir", help="folder of the TFDS data sets cifar10 and imagenet2012")
    parser.add_argument("--figure", type=Path, help="where to write the contact sheet")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_augment"))
    args = parser.parse_args()
    if args.figure:
        contact_sheet(args.figure, args.data_dir)
    results = {str(size): measure(size, args.data_dir, args.rounds, args.batches) for size in BATCH}

    print(f"{'pixels':>6} {'none':>9} {'host':>9} {'device':>9}  images/s   device / host")
    for size, result in results.items():
        rates = "".join(f" {rate:9.1f}" for rate in result["images_per_second"].values())
        print(f"{size:>6}{rates} {'':10} {result['device_over_host']:14.3f}")
    write_report(
        args.out / "augment.json",
        pillow=PIL.__version__,
        data="TFDS" if args.data_dir else "scikit-learn's sample images",
        results=results,
    )


if __name__ == "__main__":
    main()
