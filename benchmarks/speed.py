"""Images per second of the forward pass and of the training step, beside timm in PyTorch.

Command: python benchmarks/speed.py [--models cait_xxs24 ...] [--image-size 224 ...] [--batch-sizes 1 8 32]
         [--dtype float32] [--attention NAME ...] [--remat none ...] [--blocks stacked ...]
         [--torch-python=PYTHON [--compiled]] [--cpu-devices=1] [--rounds=5] [--out=runs/benchmark_speed]
  PYTHON is that of an environment with timm, torch and safetensors; without it our side alone is timed.

One device, images and weights already on it; with --cpu-devices our side makes several of one CPU, each with its
part of the batch. A training step is forward, cross-entropy, backward and AdamW. Both
sides have the same drawn weights, which timm loads strictly, and their logits are compared before anything is
timed. Rounds alternate between the sides, of which each waits while another is timed; rates are of the median
round. float32 is float32 on both sides, in matrix products too. In bfloat16 parameters stay float32 and PyTorch
has autocast and channels_last. torch.compile compiles the model anew for each batch size.

Beside other programs PyTorch's threads on CPUs lose far more by waiting busily than ours do: start this with
OMP_WAIT_POLICY=PASSIVE then. Best is a machine with nothing else on it; the JSON file has the load at the start.

A model may be a recipe, such as configs/cifar10.py:small: it is its network, and our training step is then
`train.py`'s own, with augmentation, mixing, EMA and metrics, on uint8 images; timm's has none of these.

"Of peak" is the network's arithmetic (multiply-accumulates by `cait_jax.models.inspect`, times 3 for training)
over what the device does in a large product of square matrices in the same dtype, the better of both sides.
Memory is what weights, optimiser, images and everything in between need: ours as the compiler says it, of all
devices, timm's on GPUs as PyTorch's allocator counts it.
"""

import argparse
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from export_to_timm import drawn_weights
from ml_collections import ConfigDict
from safetensors.numpy import load_file, save_file
from tabulate import tabulate

from cait_jax import UserError, create_model, export_timm
from cait_jax.allocator import keep_freed_memory
from cait_jax.kernels import DEFAULT_ATTENTION
from cait_jax.models.cait import CaiT
from cait_jax.models.inspect import macs
from cait_jax.models.variants import VARIANTS
from cait_jax.sharding import (
    batch_sharding,
    constrain_batch,
    make_mesh,
    put_batch,
    replicated,
)
from cait_jax.train.config import load_config
from cait_jax.train.optimizer import make_optimizer
from cait_jax.train.setup import build
from cait_jax.weights.timm_names import from_timm

BOUNDS = {"float32": 1e-4, "bfloat16": 2e-2}
COMPARED = 2  # images
THEIRS = ("timm", "timm compiled")
PAUSE = 0.2  # seconds, in which the threads of the side before fall asleep


class NotRun(Exception):
    """A side cannot do this; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What both sides do."""

    model: str
    image_size: int
    dtype: str

    def __str__(self) -> str:
        """For messages."""
        return f"{self.model} at {self.image_size} in {self.dtype}"


@dataclasses.dataclass(frozen=True)
class Variant:
    """One of our ways to do it."""

    attention: str
    remat: str
    blocks: str

    def __str__(self) -> str:
        """Names the attention, and of the rest what is not the default."""
        others = [self.remat] * (self.remat != "none") + [self.blocks] * (self.blocks != "stacked")
        return " ".join(["cait_jax", self.attention, *others])

    def network(self, case: Case) -> CaiT:
        if is_recipe(case.model):
            return build(recipe(case.model)).model
        exact = case.dtype == "float32" and jax.default_backend() != "cpu"
        if case.model in VARIANTS and VARIANTS[case.model].family == "RegNetY":
            raise UserError(
                f"{case.model} is not trained here: choose a transformer, as cait_xxs24"
            )
        model: Any = create_model(
            case.model,
            image_size=case.image_size,
            dtype=case.dtype,
            precision="highest" if exact else None,
            attention=self.attention,
            remat=self.remat,
            stacked=self.blocks == "stacked",
        )
        return model


def is_recipe(name: str) -> bool:
    return ".py" in name


def recipe(name: str) -> ConfigDict:
    """A recipe on images that are made here."""
    return load_config(name, {"data.name": "synthetic", "data.eval_split": "validation"})


@dataclasses.dataclass(frozen=True)
class Side:
    """What is timed.

    Attributes:
      prepare: builds a function and warms it up; gives the seconds of the first call and of a later one, and
        the bytes it needs.
      time: from a number of calls to their seconds.
    """

    prepare: Callable[[], dict[str, Any]]
    time: Callable[[int], float]


class Ours:
    """Our side: functions by name, compiled."""

    def __init__(self, weights: dict[str, np.ndarray], images: np.ndarray, devices: int) -> None:
        self.weights, self.images = weights, images
        self.mesh = make_mesh(jax.devices()[:devices])
        self.whole, self.rows = replicated(self.mesh), batch_sharding(self.mesh)
        self.functions: dict[str, Callable[[], Any]] = {}

    def logits(self, model: CaiT) -> np.ndarray:
        params = from_timm(self.weights, model)
        return np.asarray(jax.jit(model.apply)(params, self.images), np.float32)

    def prepare(self, name: str, model: CaiT, mode: str, batch: int, source: str) -> dict[str, Any]:
        """Builds a function and calls it thrice; `source` is the name of a model or recipe."""
        if batch % self.mesh.size:
            raise NotRun(f"{self.mesh.size} devices cannot share them evenly")
        variables = jax.device_put(from_timm(self.weights, model), self.whole)
        images = np.resize(self.images, (batch, *self.images.shape[1:]))
        images = jax.device_put(images, self.rows)
        make = self._forward if mode == "forward" else self._training
        if mode == "training" and is_recipe(source):
            make = functools.partial(self._recipe_training, source)
        try:
            start = time.perf_counter()
            function, memory = make(model, variables, images)
            jax.block_until_ready(function())
            first = time.perf_counter() - start
            jax.block_until_ready(function())
            start = time.perf_counter()
            jax.block_until_ready(function())
        except jax.errors.JaxRuntimeError as error:
            raise NotRun(str(error).strip().splitlines()[0][:300]) from error
        self.functions[name] = function
        return {"first": first, "seconds": time.perf_counter() - start, "memory": memory}

    def time(self, name: str, calls: int) -> float:
        """Seconds of so many calls."""
        function, result = self.functions[name], None
        start = time.perf_counter()
        for _ in range(calls):
            result = function()
        jax.block_until_ready(result)
        return time.perf_counter() - start

    def drop(self) -> None:
        """Forgets the functions and what they hold."""
        self.functions.clear()

    def _forward(
        self, model: CaiT, variables: Any, images: Any
    ) -> tuple[Callable[[], Any], int | None]:
        forward = constrain_batch(
            lambda variables, images: model.apply(variables, images), self.mesh
        )
        jitted = jax.jit(forward, in_shardings=(self.whole, self.rows), out_shardings=self.rows)
        compiled = jitted.lower(variables, images).compile()
        return lambda: compiled(variables, images), needed(compiled, self.mesh.size)

    def _training(
        self, model: CaiT, variables: Any, images: Any
    ) -> tuple[Callable[[], Any], int | None]:
        optimizer = make_optimizer(optax.constant_schedule(1e-4))
        labels = jax.device_put(np.arange(len(images)) % model.num_classes, self.rows)

        def step(params: Any, opt_state: Any, count: Any, images: Any, labels: Any) -> Any:
            key = jax.random.fold_in(jax.random.key(0), count)

            def loss_of(params: Any) -> Any:
                logits = model.apply(
                    {"params": params}, images, train=True, rngs={"drop_path": key, "dropout": key}
                )
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

            loss, gradient = jax.value_and_grad(loss_of)(params)
            updates, opt_state = optimizer.update(gradient, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, count + 1, loss

        params = variables["params"]
        start = jax.jit(optimizer.init, out_shardings=self.whole)(params)
        state = [params, start, jax.device_put(np.int32(0), self.whole)]
        jitted = jax.jit(
            constrain_batch(step, self.mesh),
            donate_argnums=(0, 1, 2),
            in_shardings=(self.whole,) * 3 + (self.rows,) * 2,
            out_shardings=self.whole,
        )
        compiled = jitted.lower(*state, images, labels).compile()

        def call() -> Any:
            *state[:], loss = compiled(*state, images, labels)
            return loss, state

        return call, needed(compiled, self.mesh.size)

    def _recipe_training(
        self, name: str, model: CaiT, variables: Any, images: Any
    ) -> tuple[Callable[[], Any], int | None]:
        config = recipe(name)
        config.batch_size = len(images)
        trainer = build(config)
        state = [trainer.init_state()]
        batch = put_batch(next(trainer.train_batches()), batch_sharding(trainer.mesh))

        def call() -> Any:
            state[0], metrics = trainer.train_step(state[0], batch)
            return metrics, state[0]

        return call, None


class Timm:
    """timm's side, in a process of another environment."""

    def __init__(self, python: str) -> None:
        worker = Path(__file__).with_name("speed_torch.py")
        self.python = python
        try:
            self.process = subprocess.Popen(
                [python, str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise UserError(f"--torch-python={python} does not start: {error.strerror}") from error

    def __enter__(self) -> "Timm":
        """Returns itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Waits for the answer."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise UserError(
                f"{self.python} ended (status {self.process.wait()}) when asked to {do}: "
                "--torch-python wants the Python of an environment with torch, timm and safetensors"
            )
        answer = json.loads(line)
        if "error" in answer:
            raise NotRun(answer["error"])
        return answer

    def prepare(self, name: str, mode: str, batch: int) -> dict[str, Any]:
        """Builds a function and calls it thrice."""
        compiled = name != "timm"
        return self.ask("prepare", name=name, mode=mode, batch=batch, compiled=compiled)

    def time(self, name: str, calls: int) -> float:
        """Seconds of so many calls."""
        return self.ask("time", name=name, calls=calls)["seconds"]


def needed(compiled: Any, devices: int) -> int | None:
    """Bytes that a compiled program has at its peak on all devices, its arguments among them, where told."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return None
    return devices * (
        analysis.argument_size_in_bytes
        + analysis.output_size_in_bytes
        + analysis.temp_size_in_bytes
        - analysis.alias_size_in_bytes
    )


def matrix_rate(dtype: str) -> float:
    """Operations per second of a product of two square matrices, here."""
    size = matrix_size()
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    precision = "highest" if dtype == "float32" else None
    product = jax.jit(lambda a: jnp.matmul(a, a, precision=precision))
    product(a).block_until_ready()
    rates = []
    for _ in range(5):
        start = time.perf_counter()
        product(a).block_until_ready()
        rates.append(2 * size**3 / (time.perf_counter() - start))
    return max(rates)


def matrix_size() -> int:
    return 2048 if jax.default_backend() == "cpu" else 8192


def compare(
    case: Case,
    variants: list[Variant],
    timm: Timm | None,
    folder: Path,
    *,
    compiled: bool,
    devices: int,
) -> tuple[Ours, dict[str, float], bool]:
    """Makes both sides of the same weights, and refuses to go on if their logits differ.

    Returns:
      Our side; the relative distance of each side's logits from the first one's; whether torch.compile works.
    """
    model = variants[0].network(case)
    weights = drawn_weights(model)
    shape = (COMPARED, *model.image_size, model.in_channels)
    images = np.random.default_rng(1).standard_normal(shape, np.float32)
    ours = Ours(weights, images, devices)
    logits: dict[str, np.ndarray] = {}
    if timm is not None:
        export_timm(folder, model, from_timm(weights, model))
        save_file({"images": images}, folder / "images.safetensors")
        timm.ask(
            "load",
            directory=str(folder),
            images=str(folder / "images.safetensors"),
            drop_path=model.drop_path_rate,
            dtype=case.dtype,
        )
        for name in THEIRS[: 1 + compiled]:
            path = str(folder / "logits.safetensors")
            try:
                timm.ask("logits", path=path, compiled=name != "timm")
            except NotRun as error:
                if name == "timm":
                    raise
                print(f"{case}: {name} is left out: {error}", file=sys.stderr)
                compiled = False
                continue
            logits[name] = load_file(path)["logits"]
    for variant in variants:
        logits[str(variant)] = ours.logits(variant.network(case))

    reference, expected = next(iter(logits.items()))
    distances = {
        name: float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
        for name, found in logits.items()
    }
    for name, distance in distances.items():
        if not distance <= BOUNDS[case.dtype]:
            raise UserError(
                f"{case}: the logits of {name} lie {distance:.1e} from those of {reference}, relative to "
                f"their size, and {BOUNDS[case.dtype]:.0e} is allowed: nothing was timed"
            )
    return ours, distances, compiled


def measure(
    case: Case,
    mode: str,
    batch: int,
    sides: dict[str, Side],
    rounds: int,
    seconds: float,
) -> list[dict[str, Any]]:
    """Times the sides in turn.

    Args:
      case: for messages and rows.
      mode: likewise.
      batch: images a call.
      sides: by name.
      rounds: measurements of each side.
      seconds: that a measurement should take, at least.

    Returns:
      A row for each side that runs.
    """
    prepared: dict[str, dict[str, Any]] = {}
    for name, side in sides.items():
        try:
            prepared[name] = side.prepare()
        except NotRun as error:
            print(f"{case}, {mode}, {batch} images: {name} is left out: {error}", file=sys.stderr)
    calls = {name: max(1, round(seconds / p["seconds"])) for name, p in prepared.items()}
    taken: dict[str, list[float]] = {name: [] for name in prepared}
    for _ in range(rounds):
        for name in prepared:
            time.sleep(PAUSE)
            taken[name].append(sides[name].time(calls[name]) / calls[name])
    rows = [
        {
            **dataclasses.asdict(case),
            "mode": mode,
            "batch": batch,
            "side": name,
            "images_per_second": batch / statistics.median(taken[name]),
            "seconds_of_a_call": taken[name],
            "seconds_of_the_first": prepared[name]["first"],
            "bytes": prepared[name]["memory"],
        }
        for name in prepared
    ]
    rates = ", ".join(f"{row['side']} {row['images_per_second']:.2f}" for row in rows)
    print(f"{case}, {mode}, {batch} images: {rates} images/s", file=sys.stderr)
    return rows


def measure_case(
    case: Case, args: argparse.Namespace, timm: Timm | None, rates: dict[str, float]
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """All modes and batch sizes of a case: its rows, and how far the logits lie apart."""
    ways = itertools.product(args.attention, args.remat, args.blocks)
    variants = [Variant(*way) for way in ways]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        ours, distances, compiled = compare(
            case,
            variants,
            timm,
            Path(folder),
            compiled=args.compiled,
            devices=args.cpu_devices,
        )
    operations = 2 * macs(dataclasses.replace(variants[0], attention="xla").network(case))
    for mode, batch in itertools.product(args.modes, args.batch_sizes):
        sides: dict[str, Side] = {}
        for variant in variants:
            # Going forward there is nothing to compute anew.
            if mode == "forward" and variant.remat != args.remat[0]:
                continue
            name = str(variant)
            prepare = functools.partial(
                ours.prepare, name, variant.network(case), mode, batch, case.model
            )
            sides[name] = Side(prepare, functools.partial(ours.time, name))
        for name in () if timm is None else THEIRS[: 1 + compiled]:
            assert timm is not None
            prepare = functools.partial(timm.prepare, name, mode, batch)
            sides[name] = Side(prepare, functools.partial(timm.time, name))
        found = measure(case, mode, batch, sides, args.rounds, args.seconds)
        ours.drop()
        if timm is not None:
            timm.ask("drop")
        each = operations * (1 if mode == "forward" else 3)
        for row in found:
            row["of_peak"] = row["images_per_second"] * each / max(rates.values())
        rows += found
    return rows, distances


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case and mode: each of our sides at its best batch size over each of timm's at its best."""
    result = []
    keys = ("model", "image_size", "dtype", "mode")
    for case, group in itertools.groupby(rows, lambda row: tuple(row[key] for key in keys)):
        fastest: dict[str, dict[str, Any]] = {}
        for row in group:
            known = fastest.get(row["side"])
            if known is None or row["images_per_second"] > known["images_per_second"]:
                fastest[row["side"]] = row
        for side, row in fastest.items():
            ratios = {
                other: row["images_per_second"] / fastest[other]["images_per_second"]
                for other in THEIRS
                if other in fastest and not side.startswith("timm")
            }
            result.append(
                {
                    **dict(zip(keys, case, strict=True)),
                    "side": side,
                    "batch": row["batch"],
                    "images_per_second": row["images_per_second"],
                    "of_peak": row["of_peak"],
                    "over": ratios,
                }
            )
    return result


def print_tables(rows: list[dict[str, Any]]) -> None:
    cases = ("model", "image_size", "dtype", "mode")
    headers = ["model", "pixels", "dtype", "mode", "batch", "side", "images/s", "of peak", "MB"]
    table = []
    for row in rows:
        megabytes = None if row["bytes"] is None else f"{row['bytes'] / 1e6:,.0f}"
        numbers = [f"{row['images_per_second']:.2f}", f"{row['of_peak']:.2f}", megabytes]
        table.append([*(row[key] for key in cases), row["batch"], row["side"], *numbers])
    right = ("pixels", "batch", "images/s", "of peak", "MB")
    align = ["right" if name in right else "left" for name in headers]
    print(tabulate(table, headers, disable_numparse=True, missingval="-", colalign=align))
    headers = [*headers[:4], "side", "best batch", "images/s", "over timm", "over timm compiled"]
    table = []
    for row in best(rows):
        ratios = [row["over"].get(other) for other in THEIRS]
        rate = f"{row['images_per_second']:.2f}"
        table.append([*(row[key] for key in cases), row["side"], row["batch"], rate, *ratios])
    print(f"\n{tabulate(table, headers, floatfmt='.2f', missingval='-')}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--models", nargs="+", default=["cait_xxs24"], help="named models, or recipes"
    )
    parser.add_argument("--image-size", nargs="+", type=int, default=[224], help="pixels a side")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[1, 8, 32])
    parser.add_argument("--dtype", nargs="+", choices=BOUNDS, default=["float32"])
    parser.add_argument(
        "--modes", nargs="+", choices=("forward", "training"), default=["forward", "training"]
    )
    parser.add_argument(
        "--attention", nargs="+", help="implementations of ours; the platform's if not given"
    )
    parser.add_argument("--remat", nargs="+", default=["none"], help="what is computed anew")
    parser.add_argument("--blocks", nargs="+", choices=("stacked", "unrolled"), default=["stacked"])
    parser.add_argument("--torch-python", help="the Python of an environment with timm")
    parser.add_argument("--compiled", action="store_true", help="timm under torch.compile too")
    parser.add_argument(
        "--cpu-devices", type=int, default=1, help="devices that our side makes of one CPU"
    )
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each side")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a measurement, at least")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_speed"))
    args = parser.parse_args()
    if args.cpu_devices > 1:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", args.cpu_devices)
    if args.torch_python:
        # Both sides live on one device; by default JAX would take most of its memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_freed_memory()
    args.attention = args.attention or [DEFAULT_ATTENTION.get(jax.default_backend(), "xla")]
    try:
        if args.torch_python:
            with Timm(args.torch_python) as timm:
                run(args, timm)
        else:
            run(args, None)
    except (UserError, NotRun) as error:
        sys.exit(f"speed.py: {error}")


def run(args: argparse.Namespace, timm: Timm | None) -> None:
    device = jax.devices()[0]
    report: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {device.device_kind}",
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "jax": jax.__version__,
        "flax": importlib.metadata.version("flax"),
        "theirs": None if timm is None else timm.ask("describe"),
        "cpu_devices": args.cpu_devices,
        "rounds": args.rounds,
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "operations_per_second": {},
        "distances": {},
        "rows": [],
    }
    args.out.mkdir(parents=True, exist_ok=True)
    for dtype in args.dtype:
        rates = report["operations_per_second"][dtype] = {"jax": matrix_rate(dtype)}
        if timm is not None:
            rates["torch"] = timm.ask("product", size=matrix_size(), dtype=dtype)["rate"]
        for name, size in itertools.product(args.models, args.image_size):
            case = Case(name, size, dtype)
            rows, report["distances"][str(case)] = measure_case(case, args, timm, rates)
            report["rows"] += rows
            report["best"] = best(report["rows"])
            (args.out / "speed.json").write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report["rows"])
    for dtype, rates in report["operations_per_second"].items():
        said = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in rates.items())
        print(f"\npeak in {dtype}, GFLOP/s of a product of {matrix_size()} squared: {said}")
    for case, distances in report["distances"].items():
        said = ", ".join(f"{name} {distance:.1e}" for name, distance in distances.items())
        print(f"logits of {case}, relative distance from the first: {said}")


if __name__ == "__main__":
    main()
