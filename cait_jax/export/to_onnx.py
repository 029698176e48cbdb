"""Writes a saved model as ONNX and runs it, in the environment of jax2onnx, where this package is not installed.

python -I to_onnx.py WORK

`CAIT_JAX` is the package's folder. WORK holds `saved/`, `options.json` (`uint8`, `attention`, `int8`, `opset`,
`external`) and `probes.npz` with `images`. It gets `model.onnx`, with `int8` `model_int8.onnx`, with `external`
the weights of each beside it in `FILE.data`, and `found.npz`: of each, `FILE/one/NUMBER` of the first image alone,
`FILE/all/NUMBER` of all at once, and `FILE/seconds`, the least of three for all.
"""

import importlib.util
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
from flax import linen as nn

BATCH_NORM = (
    nn.BatchNorm.__call__
)  # jax2onnx 0.17.1 leaves transposes out between its own and an addition


def main(work: Path) -> None:
    """Writes the files."""
    options = json.loads((work / "options.json").read_text())
    files = {"model.onnx": work / "model.onnx"}
    convert(
        work / "saved", files["model.onnx"], **{k: v for k, v in options.items() if k != "int8"}
    )
    if options["int8"]:
        files["model_int8.onnx"] = work / "model_int8.onnx"
        quantise(*files.values(), external=options["external"])
    images = np.load(work / "probes.npz")["images"]
    results: dict[str, Any] = {}
    for name, file in files.items():
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for rows, batch in (("one", images[:1]), ("all", images)):
            for number, output in enumerate(session.run(None, {"images": batch})):
                results[f"{name}/{rows}/{number}"] = output
        times = []
        for _ in range(3):
            start = time.perf_counter()
            session.run(None, {"images": images})
            times.append(time.perf_counter() - start)
        results[f"{name}/seconds"] = min(times)
    np.savez(work / "found.npz", **results)


def convert(
    saved: Path, file: Path, *, uint8: bool, attention: bool, opset: int, external: bool
) -> None:
    """Writes a saved model as ONNX with a batch of any size."""
    import jax
    import jax.numpy as jnp
    from jax2onnx import to_onnx

    from cait_jax.data.preprocess import Preprocessing
    from cait_jax.export.forward import to_export
    from cait_jax.weights.pretrained import load_pretrained, load_settings

    model, variables = load_pretrained(saved)
    settings = load_settings(saved).preprocessing
    preprocessing = None if settings is None else Preprocessing.from_dict(settings)
    exported = to_export(
        model, variables, preprocessing, uint8=uint8, attention=attention, stacked=False
    )
    variables = jax.tree.map(np.asarray, exported.variables)

    def forward(images: Any) -> Any:
        with mock.patch.object(nn.BatchNorm, "__call__", BATCH_NORM):
            return exported.function(variables, images)

    (batch,) = jax.export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct(
        (batch, *exported.image_shape), jnp.uint8 if uint8 else jnp.float32
    )
    graph = to_onnx(
        forward,
        [images],
        model_name="cait_jax",
        opset=opset,
        input_names=["images"],
        output_names=list(exported.output_names),
    )
    onnx.save(graph, file, save_as_external_data=external, location=f"{file.name}.data")
    onnx.checker.check_model(file)


def quantise(source: Path, target: Path, *, external: bool) -> None:
    """Linear layers in int8: weights with a scale for each output, activations with one for each call."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)
    quantize_dynamic(
        source,
        target,
        per_channel=True,
        weight_type=QuantType.QInt8,
        use_external_data_format=external,
    )


def _import_package(folder: Path) -> None:
    """Makes `cait_jax` importable from its folder alone, without what is installed beside it."""
    spec = importlib.util.spec_from_file_location(
        "cait_jax", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["cait_jax"] = package
    spec.loader.exec_module(package)


if __name__ == "__main__":
    _import_package(Path(os.environ["CAIT_JAX"]))
    main(Path(sys.argv[1]))
