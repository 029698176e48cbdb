"""Whether onnxruntime computes from exported ONNX files what JAX computes, over the shapes of the released models.

Command: python benchmarks/export_onnx.py --environment=DIR [--install]
                                          [--names cait_xxs24_224 ... [--depth=N] | --all [--most=PARAMETERS]]
  DIR is the Python environment of `cait export --to onnx`.

The weights are drawn, not trained, so that every part of a network shows in the outputs. A line of JSON for each
name: the largest difference relative to the largest output, on two images of noise and two drawn pictures, for one
image and for four at once; megabytes. By default the smallest model of each architecture; with --all every
released one, the smallest first, and of those that are one network under several names the first. What ONNX
cannot hold, or differs by more than 1e-5, has the reason.

With --all a line is kept in benchmarks/studies/results/export_onnx.jsonl, and what is there is not made again.
"""

import argparse
import fnmatch
import json
import math
import platform
import tempfile
import time
from pathlib import Path

import jax
from export_to_timm import drawn_weights
from reports import RESULTS, append_line, read_lines

from cait_jax import UserError, create_model, list_models
from cait_jax.export.onnx import check_onnx, export_onnx
from cait_jax.models.inspect import abstract_variables
from cait_jax.weights.timm_names import from_timm

LINES = RESULTS / "export_onnx.jsonl"
ARCHITECTURES = (
    "cait_xxs24_224", "cait_xxs24_384", "deit_tiny_patch16_224", "deit_tiny_distilled_patch16_224",
    "vit_tiny_patch16_224", "deit3_small_patch16_224", "vit_small_patch16_224.dino", "vit_base_patch16_224.mae",
    "vit_small_patch14_dinov2.lvd142m", "vit_small_patch14_reg4_dinov2.lvd142m", "regnety_160",
)  # fmt: skip


def released_networks(most: float) -> list[str]:
    """Released models of up to `most` parameters, the smallest first, but for names whose network another has."""
    found: dict[str, tuple[int, str]] = {}
    for name in list_models(pretrained=True):
        model = create_model(name)
        if hasattr(model, "drop_path_rate"):
            model = model.clone(drop_path_rate=0.0)
        leaves = jax.tree.leaves(abstract_variables(model))
        count = sum(math.prod(leaf.shape) for leaf in leaves)
        found.setdefault(repr(model), (count, name))
    return [name for count, name in sorted(found.values()) if count <= most]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--environment", type=Path, required=True)
    parser.add_argument("--install", action="store_true")
    parser.add_argument("--names", nargs="+", default=ARCHITECTURES, help="names or shell patterns")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--most", type=float, default=math.inf, help="parameters, with --all")
    parser.add_argument("--depth", type=int, help="blocks of --names, if not their own number")
    options = parser.parse_args()
    if options.all and options.depth:
        parser.error("--depth is of --names, not of --all")
    changed = {"depth": options.depth} if options.depth else {}
    names = (
        released_networks(options.most)
        if options.all
        else [n for pattern in options.names for n in fnmatch.filter(list_models(), pattern)]
    )
    finished = {row["name"]: row for row in read_lines(LINES)} if options.all else {}
    worst = max((row.get("difference", 0.0) for row in finished.values()), default=0.0)
    for name in names:
        if name in finished:
            continue
        model = create_model(name, precision="highest", **changed)
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try:
                check_onnx(model)
                variables = from_timm(drawn_weights(model), model)
                report = export_onnx(
                    folder,
                    model,
                    variables,
                    environment=options.environment,
                    install=options.install,
                )
            except UserError as error:
                line = {"name": name, "refused": str(error)}
            else:
                (check,) = report.files
                worst = max(worst, check.difference)
                line = {
                    "name": name,
                    "difference": float(f"{check.difference:.2g}"),
                    "mb": round(check.bytes / 1e6, 1),
                }
        line |= {"seconds": round(time.perf_counter() - start), "date": time.strftime("%Y-%m-%d")}
        print(json.dumps(line), flush=True)
        if options.all:
            append_line(LINES, line)
    print(f"largest difference {worst:.1e}; {platform.machine()}, JAX {jax.__version__}")


if __name__ == "__main__":
    main()
