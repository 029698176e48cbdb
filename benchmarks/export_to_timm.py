"""Whether timm and cait_jax compute the same from the same weights, in both directions, for every released model.

Command: python benchmarks/export_to_timm.py --torch-python=PYTHON [--names cait_xxs24_224 ...] [--out=runs/timm]
  PYTHON is that of an environment with timm, torch and safetensors. If this environment has PyTorch too, the
  first release's kind of .pth is read back as well.

The weights are drawn, not trained: LayerScale far from zero and everything else wide enough that every part
shows in the logits, which are of order 1. All in float32 at the highest precision, on the CPU.

To timm: weights drawn here, `export_timm`, strict loading there, logits compared. From timm: weights drawn
there, written as safetensors and as a .pth with `{"model": {"module.NAME": ...}}`, `load_pretrained` here.
One model at a time; its files are deleted after it.
"""

import argparse
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

BOUND = 1e-5


def drawn(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, np.ndarray]:
    """Weights of these names and shapes that look trained: no part of the network is near the identity."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(shapes.items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = np.zeros(shape, np.int64)
            continue
        noise = rng.standard_normal(shape, np.float32)
        if "gamma" in name or name.endswith("conv3.bn.weight"):
            weights[name] = 0.3 + 0.1 * noise
        elif name.endswith("running_var"):
            weights[name] = np.exp(0.1 * noise)
        elif ("norm" in name or ".bn." in name) and name.endswith("weight"):
            weights[name] = 1 + 0.1 * noise
        elif len(shape) == 1:
            weights[name] = 0.1 * noise
        elif name.endswith("_embed") or name.endswith("_token"):
            weights[name] = 0.3 * noise
        else:
            weights[name] = noise / np.sqrt(np.prod(shape[1:], dtype=np.float32))
    return weights


def drawn_weights(model: Any) -> dict[str, np.ndarray]:
    """`drawn` for a network, under timm's names."""
    import jax

    from cait_jax.models.inspect import abstract_variables
    from cait_jax.weights.timm_names import to_timm

    empty = jax.tree.map(
        lambda leaf: np.broadcast_to(np.int8(0), leaf.shape), abstract_variables(model)
    )
    return drawn({name: array.shape for name, array in to_timm(empty).items()}, seed=0)


def drawn_images(model, seed: int) -> np.ndarray:
    """One or two normalised images: (batch, height, width, channels)."""
    batch = 1 if getattr(model, "width", 0) > 384 else 2
    shape = (batch, *model.image_size, model.in_channels)
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def logits_of(model, variables, images: np.ndarray) -> np.ndarray:
    import jax

    return np.asarray(jax.jit(model.apply)(variables, images))


def export_ours(name: str, folder: Path) -> None:
    """Writes `folder`: weights and card for timm, and `ours.npz` with images and logits."""
    from cait_jax import create_model
    from cait_jax.weights.timm_export import export_timm
    from cait_jax.weights.timm_names import from_timm

    model = create_model(name, precision="highest")
    variables = from_timm(drawn_weights(model), model)
    export_timm(folder, model, variables)
    images = drawn_images(model, seed=1)
    np.savez(folder / "ours.npz", images=images, logits=logits_of(model, variables, images))


def compare_in_timm(name: str, folder: Path) -> None:
    """In the PyTorch environment: loads ours, draws weights of its own, writes `timm.json`, `timm.npz`."""
    import timm
    import torch
    from safetensors.torch import load_file, save_file

    ours = np.load(folder / "ours.npz")
    images = torch.from_numpy(ours["images"].transpose(0, 3, 1, 2).copy())
    model = timm.create_model(name).eval()
    loaded = model.load_state_dict(load_file(folder / "model.safetensors"), strict=True)
    with torch.inference_mode():
        logits = model(images).numpy()
    result = {
        "unmatched": [*loaded.missing_keys, *loaded.unexpected_keys],
        "to_timm": float(np.abs(logits - ours["logits"]).max()),
        "scale": float(logits.std()),
        "versions": {"timm": timm.__version__, "torch": torch.__version__},
    }
    by_directory = timm.create_model(f"local-dir:{folder}", pretrained=True)
    same = all(
        torch.equal(tensor, by_directory.state_dict()[key])
        for key, tensor in model.state_dict().items()
    )
    result["local_dir"] = same
    del by_directory

    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    state = {key: torch.from_numpy(array) for key, array in drawn(shapes, seed=2).items()}
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        np.savez(folder / "timm.npz", logits=model(images).numpy())
    save_file(state, folder / "timm.safetensors")
    torch.save(
        {"model": {f"module.{key}": tensor for key, tensor in state.items()}}, folder / "timm.pth"
    )
    (folder / "timm.json").write_text(json.dumps(result))


def load_from_timm(name: str, folder: Path) -> dict[str, float | None]:
    """The greatest difference from timm's logits after loading each of its files; None: not read."""
    from cait_jax.weights.pretrained import load_pretrained

    images, expected = (
        np.load(folder / "ours.npz")["images"],
        np.load(folder / "timm.npz")["logits"],
    )
    differences: dict[str, float | None] = {}
    for suffix in ("safetensors", "pth"):
        differences[suffix] = None
        if suffix == "pth" and importlib.util.find_spec("torch") is None:
            continue
        model, variables = load_pretrained(
            name, weights=folder / f"timm.{suffix}", precision="highest"
        )
        differences[suffix] = float(np.abs(logits_of(model, variables, images) - expected).max())
        (folder / f"timm.{suffix}").unlink()
    return differences


def compare(name: str, folder: Path, torch_python: str) -> dict[str, object]:
    shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    try:
        export_ours(name, folder)
        subprocess.run([torch_python, __file__, f"--inside={folder}", "--names", name], check=True)
        result = json.loads((folder / "timm.json").read_text())
        back = load_from_timm(name, folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    found = [result["to_timm"], *(value for value in back.values() if value is not None)]
    return {
        "name": name,
        **result,
        "from_timm_safetensors": back["safetensors"],
        "from_timm_pth": back["pth"],
        "seconds": time.perf_counter() - start,
        "ok": max(found) <= BOUND and not result["unmatched"] and result["local_dir"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--torch-python", help="the Python of an environment with timm")
    parser.add_argument("--names", nargs="+", help="models; all released ones if not given")
    parser.add_argument("--out", type=Path, default=Path("runs/timm"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        compare_in_timm(args.names[0], args.inside)
        return
    if not args.torch_python:
        parser.error(
            "--torch-python=PYTHON is needed: an environment with timm, torch, safetensors"
        )

    from tabulate import tabulate

    from cait_jax.weights.hub import RELEASED

    names = args.names or list(RELEASED)
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict[str, object]] = []
    for name in names:
        results.append(compare(name, args.out / name, args.torch_python))
        report = {"bound": BOUND, "machine": platform.processor(), "results": results}
        (args.out / "results.json").write_text(json.dumps(report, indent=1) + "\n")
        print(json.dumps(results[-1]), flush=True)
    columns = ("name", "to_timm", "from_timm_safetensors", "from_timm_pth", "scale", "ok")
    print(tabulate([[row[c] for c in columns] for row in results], headers=columns, floatfmt=".1e"))
    if not all(row["ok"] for row in results):
        sys.exit(1)


if __name__ == "__main__":
    main()
