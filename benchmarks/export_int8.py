"""What int8 costs in accuracy: a classifier in JAX, as ONNX in float32, and as ONNX with linear layers in int8.

Command: python benchmarks/export_int8.py --model=RUN --data=digits --split=test --environment=DIR [--images=N]
  RUN is a run or a saved model; DIR the Python environment of `cait export --to onnx`.

A line of JSON for each: accuracy on the first N images of the split (default: all of it) and the fraction of them
that get the class that they get in JAX, and the size of the file. All three see the same uint8 crops.
"""

import argparse
import itertools
import json
import subprocess
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from cait_jax import load_pretrained, preprocessing
from cait_jax.augment.pipeline import normalise
from cait_jax.data.sources import load_split
from cait_jax.evaluation.scores import batches_of, with_channels
from cait_jax.export.environment import environment_python
from cait_jax.export.onnx import INT8, MODEL, export_onnx
from cait_jax.sharding import make_mesh

BATCH = 32
IN_ONNXRUNTIME = f"""
import sys, numpy, onnxruntime
images = numpy.load(sys.argv[2])
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
parts = [session.run(None, {{"images": images[i : i + {BATCH}]}})[0] for i in range(0, len(images), {BATCH})]
numpy.save(sys.argv[3], numpy.concatenate(parts))
"""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--split", default="test")
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--images", type=int, default=None)
    options = parser.parse_args()
    model, variables = load_pretrained(options.model, precision="highest")
    prepare = preprocessing(options.model)
    split = load_split(options.data, options.split, image_size=prepare.image_size)
    split = with_channels(split, prepare.channels)
    with batches_of(split, prepare, BATCH, 0, make_mesh()) as batches:
        count = -(-(options.images or len(split)) // BATCH)
        kept = [
            (batch["image"][batch["mask"]], batch["label"][batch["mask"]])
            for batch in itertools.islice(batches, count)
        ]
    images, labels = (np.concatenate(parts)[: options.images] for parts in zip(*kept, strict=True))

    @jax.jit
    def logits_of(batch):
        return model.apply(variables, normalise(batch, prepare.mean, prepare.std))

    parts = np.array_split(images, -(-len(images) // BATCH))
    in_jax = np.concatenate([np.asarray(logits_of(jnp.asarray(part))) for part in parts])
    tell("JAX", in_jax, labels, in_jax, images=len(images))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export_onnx(
            folder, model, variables, environment=options.environment, preprocessing=prepare,
            uint8=True, int8=True,
        )  # fmt: skip
        np.save(folder / "images.npy", images)
        python = environment_python(options.environment, install=False)
        for file in (MODEL, INT8):
            arguments = [folder / file, folder / "images.npy", folder / "logits.npy"]
            subprocess.run([python, "-I", "-c", IN_ONNXRUNTIME, *arguments], check=True)
            size = (folder / file).stat().st_size
            tell(file, np.load(folder / "logits.npy"), labels, in_jax, mb=round(size / 1e6, 2))


def tell(name, logits, labels, in_jax, **more) -> None:
    chosen = logits.argmax(-1)
    line = {
        "what": name,
        "accuracy": round(float((chosen == labels).mean()), 4),
        "as_in_jax": round(float((chosen == in_jax.argmax(-1)).mean()), 4),
        **more,
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
