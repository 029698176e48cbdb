"""What it costs to read and prepare training images, in CPU time: stage by stage, and against tf.data.

Command: python benchmarks/input.py --data-dir=DIR [--tf-python=PYTHON] [--cifar] [--rounds=7]
         [--out=runs/benchmark_input]

DIR is a TFDS folder with `imagenet2012` as array_record, and for --cifar `cifar10`. PYTHON is an
interpreter that has TensorFlow; it reads the same JPEG files from a TFRecord file, draws boxes of the same
distribution, and resizes them with antialiasing. Rounds of all sides alternate, figures are medians, and the
time is that of the processor over all threads, which other work on the machine hardly changes. Images are
JPEGs of the split as it is, crops 224 pixels wide, batches of 50. Training flips on the device, so
`train_batches` does not, and tf.data does. Both ways to resize (`data.resize`) are timed, and how far crops made
in other ways are from Pillow's: fast, JPEGs shrunk while decoding, `reducing_gap`, and those of kornia-rs and
cykooz-resizer (fast_image_resize) where they are installed.

With --cifar, a batch of CIFAR-10 from memory is set against the step of `configs/cifar10.py:small`.
"""

import argparse
import contextlib
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SIZE = (224, 224)
BATCH = 50
SCALE, RATIO = (0.08, 1.0), (0.75, 1.3333)


def of_stages(split: Any) -> dict[str, Callable[[int], float | None]]:
    """What each stage does alone for all images, and the whole; functions of the round.

    They are timed from outside but for those that return seconds.
    """
    import cv2
    import numpy as np

    from cait_jax.data import train_batches
    from cait_jax.data.decode import RESIZES, decode_image, random_resized_crop

    cv2.setNumThreads(1)
    indices = list(range(len(split)))
    files = [split.records[i]["image"] for i in indices]
    decoded = [decode_image(data) for data in files]
    crops = [random_resized_crop(data, rng(0, i), image_size=SIZE) for i, data in enumerate(files)]

    def read(turn: int) -> None:
        for i in indices:
            split.records[i]["image"]

    def decode_by_opencv(turn: int) -> None:
        for data in files:
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)

    def decode_by_pillow(turn: int) -> None:
        for data in files:
            decode_image(data)

    def resize(way: Callable[[Any], Any], turn: int) -> None:
        for i, pixels in enumerate(decoded):
            way(box_of(pixels, rng(turn, i)))

    def flip(turn: int) -> None:
        for crop in crops:
            cv2.flip(crop, 1)

    def batch(turn: int) -> None:
        for start in range(0, len(crops), BATCH):
            np.stack(crops[start : start + BATCH])

    def crop(way: str, turn: int) -> None:
        draws = {"scale": SCALE, "ratio": RATIO, "resize": way}
        for i, data in enumerate(files):
            random_resized_crop(data, rng(turn, i), image_size=SIZE, **draws)

    def opencv_and_pillow(turn: int) -> None:
        for i, data in enumerate(files):
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            resizers()["Pillow"](box_of(pixels, rng(turn, i)))

    def whole(way: str, turn: int) -> float:
        crop = functools.partial(random_resized_crop, scale=SCALE, ratio=RATIO, resize=way)
        options = {"batch_size": BATCH, "image_size": SIZE, "crop": crop}
        with train_batches(split, seed=turn, **options) as batches:
            next(batches)  # threads start, and the order of the epoch is drawn
            start = time.process_time()
            for _ in itertools.islice(batches, len(files) // BATCH):
                pass
            return time.process_time() - start

    bound = functools.partial
    return {
        "read a record": read,
        "decode, OpenCV": decode_by_opencv,
        "decode, Pillow": decode_by_pillow,
        **{f"crop and resize, {name}": bound(resize, way) for name, way in resizers().items()},
        "flip": flip,
        "batch": batch,
        **{f"decode, crop, resize: {way}": bound(crop, way) for way in RESIZES},
        "decode, crop, resize: OpenCV and Pillow": opencv_and_pillow,
        **{f"train_batches, {way}": bound(whole, way) for way in RESIZES},
    }


def box_of(pixels: Any, random: Any) -> Any:
    """A random box of an image, as an array."""
    from cait_jax.data.decode import sample_box

    top, left, height, width = sample_box(random, pixels.shape[:2], scale=SCALE, ratio=RATIO)
    return pixels[top : top + height, left : left + width]


def resizers() -> dict[str, Callable[[Any], Any]]:
    """Ways to resize a box of pixels to `SIZE`; the first is the one to be equal to."""
    import numpy as np
    from PIL import Image

    from cait_jax.data import decode

    def pillow(box: Any, **options: Any) -> Any:
        image = Image.fromarray(box)
        return np.asarray(image.resize(SIZE[::-1], Image.Resampling.BICUBIC, **options))

    ways = {
        "Pillow": pillow,
        "Pillow, reducing_gap=3": functools.partial(pillow, reducing_gap=3.0),
        "OpenCV": lambda box: decode._resize(Image.fromarray(box), SIZE[::-1], "fast"),
    }
    with contextlib.suppress(ImportError):
        from kornia_rs.imgproc import resize

        ways["kornia-rs"] = lambda box: resize(
            np.ascontiguousarray(box), SIZE, "bicubic", antialias=True
        )
    with contextlib.suppress(ImportError):
        import cykooz_resizer as fir

        resizer = fir.Resizer()
        options = fir.ResizeOptions(fir.ResizeAlg.convolution(fir.FilterType.catmull_rom))

        def fast_image_resize(box: Any) -> Any:
            out = Image.new("RGB", SIZE[::-1])
            resizer.resize_pil(Image.fromarray(box), out, options)
            return np.asarray(out)

        ways["fast_image_resize"] = fast_image_resize
    return ways


def rng(turn: int, number: int) -> Any:
    import numpy as np

    return np.random.Generator(np.random.Philox(key=[turn, number]))


def grey_levels_apart(split: Any) -> dict[str, dict[str, float]]:
    """How far crops are from Pillow's: mean, percentiles, the greatest, and the greatest 99.9th of one crop."""
    import io

    import numpy as np
    from PIL import Image

    from cait_jax.data.decode import decode_image, random_resized_crop

    files = [split.records[i]["image"] for i in range(len(split))]
    boxes = [box_of(decode_image(data), rng(0, i)) for i, data in enumerate(files)]
    reference, *others = resizers().items()
    expected = [reference[1](box).astype(int) for box in boxes]
    found = {name: [way(box) for box in boxes] for name, way in others}
    for way in ("exact", "fast"):
        draws = {"scale": SCALE, "ratio": RATIO, "resize": way}
        found[f"random_resized_crop, {way}"] = [
            random_resized_crop(data, rng(0, i), image_size=SIZE, **draws)
            for i, data in enumerate(files)
        ]

    def differences(crops: Any, expected: Any) -> dict[str, float]:
        apart = [np.abs(crop - other) for crop, other in zip(crops, expected, strict=True)]
        every = np.concatenate([crop.ravel() for crop in apart])
        return {
            "mean": float(every.mean()),
            "p99": float(np.percentile(every, 99)),
            "p99.9": float(np.percentile(every, 99.9)),
            "max": float(every.max()),
            "p99.9 of the worst crop": float(max(np.percentile(crop, 99.9) for crop in apart)),
        }

    def eighth(data: bytes, scale: int) -> Any:
        """A whole JPEG shrunk by 8, of which by `scale` while it is decoded."""
        image = Image.open(io.BytesIO(data))
        size = (image.width // 8, image.height // 8)
        box = (0, 0, image.width / scale, image.height / scale)
        image.draft("RGB", (image.width // scale, image.height // scale))
        return np.asarray(image.convert("RGB").resize(size, Image.Resampling.BICUBIC, box=box))

    result = {name: differences(crops, expected) for name, crops in found.items()}
    whole = [eighth(data, 1).astype(int) for data in files]
    for scale in (2, 4):
        name = f"a JPEG shrunk by 8, by {scale} in decoding"
        result[name] = differences([eighth(data, scale) for data in files], whole)
    return result


# The other side. This part runs under an interpreter that may have nothing but TensorFlow.


def serve_tensorflow(tfrecord: str) -> None:
    """Reads names of resizing methods from standard input, and answers with seconds of processor time."""
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)

    def dataset(method: str) -> Any:
        def crop(data: Any) -> Any:
            begin, size, _ = tf.image.sample_distorted_bounding_box(
                tf.image.extract_jpeg_shape(data),
                tf.zeros((1, 0, 4)),
                area_range=SCALE,
                aspect_ratio_range=RATIO,
                max_attempts=10,
                use_image_if_no_bounding_boxes=True,
            )
            window = tf.concat([begin[:2], size[:2]], axis=0)
            image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
            image = tf.image.resize(image, SIZE, method, antialias=True)
            image = tf.saturate_cast(tf.round(image), tf.uint8)
            return tf.image.random_flip_left_right(image)

        return tf.data.TFRecordDataset(tfrecord).map(crop).batch(BATCH).prefetch(1)

    datasets = {method: dataset(method) for method in ("bicubic", "bilinear")}
    print(json.dumps({"tensorflow": tf.__version__}), flush=True)
    for line in sys.stdin:
        start = time.process_time()
        for _ in datasets[line.strip()]:
            pass
        print(json.dumps(time.process_time() - start), flush=True)


class TensorFlow:
    """The process of the other side."""

    def __init__(self, python: str, split: Any, folder: Path) -> None:
        from cait_jax.data.prepare import masked_crc

        path = folder / "images.tfrecord"
        with path.open("wb") as file:
            for i in range(len(split)):
                data = split.records[i]["image"]
                length = len(data).to_bytes(8, "little")
                file.write(length + masked_crc(length).to_bytes(4, "little"))
                file.write(data + masked_crc(data).to_bytes(4, "little"))
        self.process = subprocess.Popen(
            [python, __file__, f"--serve-tensorflow={path}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self.version = self.answer()["tensorflow"]

    def answer(self) -> Any:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the interpreter of --tf-python ended: has it TensorFlow?")
        return json.loads(line)

    def seconds(self, method: str) -> float:
        print(method, file=self.process.stdin, flush=True)
        return self.answer()

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def seconds_of(function: Callable[[int], float | None], turn: int) -> float:
    start = time.process_time()
    own = function(turn)
    return time.process_time() - start if own is None else own


def cifar10(data_dir: str, rounds: int) -> dict[str, Any]:
    """Seconds of a batch of CIFAR-10 from memory, and of the step that it feeds."""
    import jax

    from cait_jax.sharding import batch_sharding, put_batch
    from cait_jax.train.setup import build
    from configs import cifar10

    config = cifar10.get_config("small")
    config.data.data_dir = data_dir
    trainer = build(config)
    state = trainer.init_state()
    times: dict[str, list[float]] = {"batch": [], "step": []}
    with trainer.train_batches() as batches:
        for turn in range(rounds + 1):
            start = time.perf_counter()
            batch = next(batches)
            middle = time.perf_counter()
            state, metrics = trainer.train_step(
                state, put_batch(batch, batch_sharding(trainer.mesh))
            )
            jax.block_until_ready((state, metrics))
            if turn:  # the first compiles
                times["batch"].append(middle - start)
                times["step"].append(time.perf_counter() - middle)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return {
        "batch_size": config.batch_size,
        "seconds": times,
        "batch_over_step": medians["batch"] / medians["step"],
        "medians": medians,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", help="the folder of the TFDS data sets")
    parser.add_argument("--split", default="train+validation", help="of imagenet2012")
    parser.add_argument("--tf-python", help="an interpreter that has TensorFlow")
    parser.add_argument("--cifar", action="store_true", help="time CIFAR-10 too")
    parser.add_argument("--rounds", type=int, default=7, help="measurements of each side")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_input"))
    parser.add_argument("--serve-tensorflow", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve_tensorflow:
        serve_tensorflow(args.serve_tensorflow)
        return

    from cait_jax.data import load_split

    split = load_split("imagenet2012", args.split, image_size=SIZE, data_dir=args.data_dir)
    stages = of_stages(split)
    rates: dict[str, list[float]] = {name: [] for name in stages}
    with tempfile.TemporaryDirectory() as folder:
        other = TensorFlow(args.tf_python, split, Path(folder)) if args.tf_python else None
        for turn in range(args.rounds + 1):
            measured = {name: seconds_of(stage, turn) for name, stage in stages.items()}
            if other is not None:
                for method in ("bicubic", "bilinear"):
                    measured[f"tf.data, whole, antialiased {method}"] = other.seconds(method)
            if turn:  # the first warms up
                for name, seconds in measured.items():
                    rates.setdefault(name, []).append(len(split) / seconds)
        if other is not None:
            other.close()

    medians = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'images per CPU-second':44} {'median':>9}  all")
    for name, values in rates.items():
        print(f"{name:44} {medians[name]:9,.0f}  {' '.join(f'{value:,.0f}' for value in values)}")
    result: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "images": len(split),
        "images_per_cpu_second": rates,
        "medians": medians,
        "grey_levels_from_pillow": grey_levels_apart(split),
    }
    print("grey levels from Pillow's crops")
    for name, levels in result["grey_levels_from_pillow"].items():
        print(f"{name:44} {', '.join(f'{key} {value:.3g}' for key, value in levels.items())}")
    if other is not None:
        result["tensorflow"] = other.version
        result["ratios_to_tf_data"] = {
            f"{way} over {method}": medians[f"train_batches, {way}"]
            / medians[f"tf.data, whole, antialiased {method}"]
            for way in ("exact", "fast")
            for method in ("bicubic", "bilinear")
        }
        for pair, ratio in result["ratios_to_tf_data"].items():
            print(f"train_batches over tf.data, antialiased: {pair}: {ratio:.2f}")
    if args.cifar:
        found = result["cifar10"] = cifar10(args.data_dir, args.rounds)
        print(
            f"CIFAR-10, {found['batch_size']} images: batch {found['medians']['batch'] * 1e3:.1f} ms, step of "
            f"the small model {found['medians']['step'] * 1e3:.0f} ms, ratio {found['batch_over_step']:.4f}"
        )
    out = args.out / time.strftime("%Y%m%d-%H%M%S")
    out.mkdir(parents=True)
    (out / "input.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
