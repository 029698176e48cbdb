"""How long a training step takes to trace, lower and compile, and how large its program is, by depth.

Command: python benchmarks/compile.py [--config=configs/cait_m48.py] [--depths 12 24 36 48] [--rounds=1]
         [--blocks stacked] [--out=runs/benchmark_compile]

The step is the config's own, as `cait_jax.train.setup.build` makes it, with made-up images and another depth. It
is compiled for this machine's devices, not run. Each measurement has a process of its own, without JAX's cache.
"Plain" is the first depth given again, without augmentation, mixing and erasing: the difference to it is theirs,
whatever the depth. Ratios are to depth 24, or to the first depth if that is not among them.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SECONDS = ("trace", "lower", "compile", "total")
SIZES = ("stablehlo_lines", "hlo_lines", "executable_bytes")
SHOWN = ("total", "stablehlo_lines", "executable_bytes")  # of these, ratios are in the table


def measure(path: str, depth: int, stacked: bool, plain: bool) -> dict[str, Any]:
    """In a process of its own: times the way from config to executable."""
    start = time.perf_counter()
    import jax

    from cait_jax.plan.compile import trace
    from cait_jax.train.config import load_config
    from cait_jax.train.setup import build

    imported = time.perf_counter()
    config = load_config(path)
    config.data.name = "synthetic"
    config.model.depth, config.model.stacked = depth, stacked
    if plain:
        augment = config.augment
        augment.hflip, augment.rand_augment = False, ""
        augment.reprob = augment.mixup = augment.cutmix = 0.0
    trainer = build(config)
    times = [time.perf_counter()]
    traced = trace(trainer)
    times.append(time.perf_counter())
    lowered = traced.lower()
    times.append(time.perf_counter())
    compiled = lowered.compile()
    times.append(time.perf_counter())
    device = jax.devices()[0]
    return {
        "import": imported - start,
        "set_up": times[0] - imported,
        "trace": times[1] - times[0],
        "lower": times[2] - times[1],
        "compile": times[3] - times[2],
        "total": times[3] - times[0],
        "stablehlo_lines": len(lowered.as_text().splitlines()),
        "hlo_lines": len(compiled.as_text().splitlines()),
        "executable_bytes": len(compiled.runtime_executable().serialize()),
        "batch_size": config.batch_size,
        "machine": f"{platform.machine()}, {device.device_kind}",
        "jax": jax.__version__,
    }


def in_a_process(args: argparse.Namespace, depth: int, blocks: str, plain: bool) -> dict[str, Any]:
    """Starts this file anew for one measurement."""
    command = [sys.executable, __file__, f"--config={args.config}", f"--inside={depth}"]
    command += ["--blocks", blocks, *["--plain"] * plain]
    environment = {**os.environ, "JAX_ENABLE_COMPILATION_CACHE": "false"}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        sys.exit(f"compile.py: depth {depth} was not compiled; what is above says why")
    return json.loads(done.stdout.splitlines()[-1])


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of the same measurement."""
    return {
        key: statistics.median(run[key] for run in runs)
        if isinstance(value, int | float)
        else value
        for key, value in runs[0].items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/cait_m48.py", help="a recipe")
    parser.add_argument("--depths", nargs="+", type=int, default=[12, 24, 36, 48])
    parser.add_argument("--blocks", nargs="+", choices=("stacked", "unrolled"), default=["stacked"])
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_compile"))
    parser.add_argument("--inside", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--plain", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.inside:
        stacked = args.blocks == ["stacked"]
        print(json.dumps(measure(args.config, args.inside, stacked, args.plain)))
        return

    from tabulate import tabulate

    kinds = [(blocks, depth, False) for blocks in args.blocks for depth in args.depths]
    kinds.append((args.blocks[0], args.depths[0], True))
    runs: dict[tuple[str, int, bool], list[dict[str, Any]]] = {kind: [] for kind in kinds}
    for _ in range(args.rounds):
        for blocks, depth, plain in kinds:
            run = in_a_process(args, depth, blocks, plain)
            runs[blocks, depth, plain].append(run)
            print(
                f"{blocks}, depth {depth}{', plain' * plain}: {run['total']:.1f} s", file=sys.stderr
            )
    medians = {kind: summary(found) for kind, found in runs.items()}

    table, rows = [], []
    for (blocks, depth, plain), row in medians.items():
        usual = medians.get((blocks, 24, False), medians[blocks, args.depths[0], False])
        ratios = {key: row[key] / usual[key] for key in (*SECONDS, *SIZES)}
        rows.append(
            {
                "blocks": blocks,
                "depth": depth,
                "plain": plain,
                **row,
                "ratios": ratios,
                "runs": runs[blocks, depth, plain],
            }
        )
        seconds = [f"{row[key]:.2f}" for key in SECONDS]
        sizes = [f"{row[key]:,.0f}" for key in SIZES]
        shown = [f"{ratios[key]:.2f}" for key in SHOWN]
        table.append([blocks + " plain" * plain, depth, *seconds, *sizes, *shown])
    headers = [
        "blocks", "depth", "trace s", "lower s", "compile s", "total s", "StableHLO lines", "HLO lines",
        "executable bytes", *(f"{key.split('_')[0]} ratio" for key in SHOWN),
    ]  # fmt: skip
    print(tabulate(table, headers, disable_numparse=True, stralign="right"))
    whole = medians[args.blocks[0], args.depths[0], False]
    plain_run = medians[args.blocks[0], args.depths[0], True]
    part = {key: whole[key] - plain_run[key] for key in (*SECONDS, *SIZES)}
    print(
        f"\naugmentation, mixing and erasing: {part['total']:.1f} s in all, {part['compile']:.1f} s of it "
        f"compiling; {part['stablehlo_lines']:,.0f} StableHLO lines, {part['executable_bytes']:,.0f} bytes"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": whole["machine"],
        "cores": os.cpu_count(),
        "jax": whole["jax"],
        "config": args.config,
        "rows": rows,
        "augmentation": part,
    }
    (args.out / "compile.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
