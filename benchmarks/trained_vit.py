"""Whether a trained ViT-S/14 gives here what onnxruntime gives: features of photographs, through every block.

Command: python benchmarks/trained_vit.py --onnx=vit_s_focus.onnx --weights=vit_s14.safetensors
         --onnx-python=PYTHON [--photographs=DIR] [--out=runs/trained_vit]

The network is `vit_small_patch14_dinov2.lvd142m` at 224 pixels. --onnx is a file with that network and its last
norm (the Add that takes `backbone.layernorm.bias`), --weights the same weights under timm's names, and
--onnx-python the Python of an environment with onnx, onnxruntime and numpy. Four photographs, or random images
where none are given. The largest difference of the class token's features may be 2e-5, of numbers up to 8.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import numpy as np

BOUND = 2e-5
NAME = "vit_small_patch14_dinov2.lvd142m"


def features_of_onnx(file: Path, images: np.ndarray) -> np.ndarray:
    """In the environment of onnxruntime: outputs of the last norm for images (batch, 3, 224, 224)."""
    import onnx
    import onnxruntime

    model = onnx.load(file)
    (last,) = [
        node.output[0]
        for node in model.graph.node
        if node.op_type == "Add" and "backbone.layernorm.bias" in node.input
    ]
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, None)
    )
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    (features,) = session.run([last], {session.get_inputs()[0].name: images})
    return features[:, 0]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--onnx-python")
    parser.add_argument("--photographs", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/trained_vit"))
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        images = np.load(args.inside)
        np.save(args.inside, features_of_onnx(args.onnx, images))
        return
    if not (args.weights and args.onnx_python):
        parser.error("--weights=FILE and --onnx-python=PYTHON are needed")

    from reports import write_report

    import cait_jax

    if args.photographs:
        prepare = cait_jax.Preprocessing((224, 224))
        images = np.asarray(prepare(sorted(args.photographs.rglob("*.jpg"))[:4]))
    else:
        images = np.random.default_rng(0).standard_normal((4, 224, 224, 3), np.float32)
    model, variables = cait_jax.load_pretrained(NAME, weights=args.weights, image_size=224)
    ours = np.asarray(model.apply(variables, images))
    args.out.mkdir(parents=True, exist_ok=True)
    exchanged = args.out / "exchanged.npy"
    np.save(exchanged, np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    command = [args.onnx_python, __file__, f"--onnx={args.onnx}", f"--inside={exchanged}"]
    subprocess.run(command, check=True)
    theirs = np.load(exchanged)
    exchanged.unlink()
    difference, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    print(f"largest difference {difference:.2e} of numbers up to {largest:.2f}")
    write_report(args.out / "trained_vit.json", difference=difference, largest=largest)
    if difference > BOUND:
        sys.exit(1)


if __name__ == "__main__":
    main()
