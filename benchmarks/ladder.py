"""What each part of a vision transformer adds: seven networks from no attention to class attention.

Command: python benchmarks/ladder.py [--data_dir=DIR] [--seeds=3] [--rungs=one_head,block] [--out=runs/ladder]
                                     [--report]

5,000 training and 1,000 test images of CIFAR-10 at 224 pixels, patches of 16, width 64, one block, batch 32, 15
epochs, Adam at 1e-3, no augmentation: the setting of a published tutorial. Prints a table of the test accuracy
after the last epoch, mean and standard deviation over seeds. A run is saved after each epoch in
OUT/RUNG_seedN.msgpack, and the same command continues it. Of a finished run the history is a line of
benchmarks/studies/results/ladder.jsonl, and it is not trained again; of seed 0 it is, where OUT has no parameters.
With --report it trains nothing: it prints the table, and which runs are missing.
"""

import argparse
import json
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import serialization
from reports import RESULTS, append_line, read_lines

from cait_jax.data import InMemory, load_split
from cait_jax.files import atomic_replace

WIDTH, PATCH, SIDE, CLASSES = 64, 16, 224, 10
BATCH, EPOCHS, LEARNING_RATE = 32, 15, 1e-3
PUBLISHED = {"one_head": 26.5, "four_heads": 33.9, "block": 39.1}  # final epoch, percent


class Embed(nn.Module):
    """Images (batch, 224, 224, 3) to a class token and 196 patch tokens (batch, 197, 64), with positions."""

    class_token: bool = True

    @nn.compact
    def __call__(self, images):
        batch, grid = images.shape[0], SIDE // PATCH
        patches = images.reshape(batch, grid, PATCH, grid, PATCH, 3).swapaxes(2, 3)
        x = nn.Dense(WIDTH, name="patch")(patches.reshape(batch, grid**2, PATCH * PATCH * 3))
        if self.class_token:
            token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, WIDTH))
            x = jnp.concatenate([jnp.tile(token, (batch, 1, 1)), x], axis=1)
        return x + self.param("position", nn.initializers.normal(0.02), (1, *x.shape[1:]))


class NoAttention(nn.Module):
    """The head reads the class token, which nothing has told about the patches."""

    @nn.compact
    def __call__(self, images):
        x = Embed()(images)
        return nn.Dense(CLASSES)(x[:, 0])


class Attention(nn.Module):
    """Every token becomes a weighted mean of values of all tokens."""

    heads: int

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((self.heads, WIDTH // self.heads), name=n)(x) for n in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(WIDTH // self.heads)
        weights = nn.softmax(scores)
        self.sow("intermediates", "weights", weights)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(x)


class OneHead(nn.Module):
    """One attention between embedding and head."""

    heads: int = 1

    @nn.compact
    def __call__(self, images):
        x = Embed()(images)
        x = Attention(self.heads)(x)
        return nn.Dense(CLASSES)(x[:, 0])


class FourHeads(OneHead):
    """Four attentions of a quarter of the width beside each other."""

    heads: int = 4


class Mlp(nn.Module):
    """Two linear layers for each token by itself."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x)))


class Block(nn.Module):
    """Attention and MLP read a normalised stream and add to it."""

    @nn.compact
    def __call__(self, images):
        x = Embed()(images)
        x = x + Attention(heads=4)(nn.LayerNorm()(x))
        x = x + Mlp()(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


class TalkingHeadsAttention(nn.Module):
    """Attention whose maps are mixed over heads before and after the softmax (arXiv 2003.02436)."""

    heads: int

    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.DenseGeneral((self.heads, WIDTH // self.heads), name=n)(x) for n in "qkv")
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(WIDTH // self.heads)
        scores = nn.Dense(self.heads, name="before")(scores.swapaxes(1, 3)).swapaxes(1, 3)
        weights = nn.softmax(scores)
        weights = nn.Dense(self.heads, name="after")(weights.swapaxes(1, 3)).swapaxes(1, 3)
        self.sow("intermediates", "weights", weights)
        x = jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(x)


class TalkingHeads(nn.Module):
    """The block with talking heads."""

    @nn.compact
    def __call__(self, images):
        x = Embed()(images)
        x = x + TalkingHeadsAttention(heads=4)(nn.LayerNorm()(x))
        x = x + Mlp()(nn.LayerNorm()(x))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch, small at first (CaiT, equation 4)."""

    @nn.compact
    def __call__(self, branch):
        return branch * self.param("gamma", nn.initializers.constant(0.1), (WIDTH,))


class LayerScaled(nn.Module):
    """The block with talking heads and LayerScale."""

    @nn.compact
    def __call__(self, images):
        x = Embed()(images)
        x = x + LayerScale()(TalkingHeadsAttention(heads=4)(nn.LayerNorm()(x)))
        x = x + LayerScale()(Mlp()(nn.LayerNorm()(x)))
        return nn.Dense(CLASSES)(nn.LayerNorm()(x)[:, 0])


class ClassAttention(nn.Module):
    """The class token, first of `u`, reads itself and the patches (CaiT, equations 5 to 7)."""

    heads: int

    @nn.compact
    def __call__(self, u):
        head = (self.heads, WIDTH // self.heads)
        q = nn.DenseGeneral(head, name="q")(u[:, :1])
        k, v = (nn.DenseGeneral(head, name=n)(u) for n in "kv")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / jnp.sqrt(head[1]))
        self.sow("intermediates", "weights", weights)
        return nn.DenseGeneral(WIDTH, axis=(-2, -1), name="out")(
            jnp.einsum("bhqk,bkhd->bqhd", weights, v)
        )


class Cait(nn.Module):
    """CaiT with one block of each stage: patches first, then a class token that reads them."""

    @nn.compact
    def __call__(self, images):
        x = Embed(class_token=False)(images)
        x = x + LayerScale()(TalkingHeadsAttention(heads=4)(nn.LayerNorm()(x)))
        x = x + LayerScale()(Mlp()(nn.LayerNorm()(x)))

        token = self.param("class_token", nn.initializers.normal(0.02), (1, 1, WIDTH))
        cls = jnp.tile(token, (x.shape[0], 1, 1))
        u = nn.LayerNorm()(jnp.concatenate([cls, x], axis=1))
        cls = cls + LayerScale()(ClassAttention(heads=4)(u))
        cls = cls + LayerScale()(Mlp()(nn.LayerNorm()(cls)))
        return nn.Dense(CLASSES)(nn.LayerNorm()(cls)[:, 0])


RUNGS: dict[str, type[nn.Module]] = {
    "no_attention": NoAttention,
    "one_head": OneHead,
    "four_heads": FourHeads,
    "block": Block,
    "talking_heads": TalkingHeads,
    "layer_scale": LayerScaled,
    "class_attention": Cait,
}


def enlarge(images):
    """uint8 images of any size to float32 (batch, 224, 224, 3) in [-1, 1]."""
    images = images.astype(jnp.float32) / 127.5 - 1.0
    return jax.image.resize(images, (images.shape[0], SIDE, SIDE, 3), "bilinear")


def load(data_dir: str | None, train: int = 5000, test: int = 1000) -> tuple[InMemory, InMemory]:
    """The first images of CIFAR-10's splits."""
    names = f"train[:{train}]", f"test[:{test}]"
    return tuple(load_split("cifar10", s, image_size=(32, 32), data_dir=data_dir) for s in names)


def read(out: Path, rung: str, seed: int) -> tuple[dict[str, Any], list[dict[str, float]]] | None:
    """What a run has saved: `params` and `adam`, and a dict for each epoch; None where there is nothing."""
    file = out / f"{rung}_seed{seed}.msgpack"
    if not file.exists():
        return None
    saved: Any = serialization.msgpack_restore(file.read_bytes())
    return saved["state"], json.loads(saved["history"])


def train(rung: str, seed: int, data: tuple[InMemory, InMemory], out: Path, epochs: int = EPOCHS):
    """Trains one network, or continues its run under `out`; its state, with an accuracy for each epoch."""
    model, optimizer = RUNGS[rung](), optax.adam(LEARNING_RATE)
    fit, test = data
    file = out / f"{rung}_seed{seed}.msgpack"

    @jax.jit
    def init(key):
        params = model.init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]
        return {"params": params, "adam": optimizer.init(params)}

    @jax.jit
    def step(state, images, labels):
        def loss(params):
            logits = model.apply({"params": params}, enlarge(images))
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        value, gradients = jax.value_and_grad(loss)(state["params"])
        updates, adam = optimizer.update(gradients, state["adam"])
        return {"params": optax.apply_updates(state["params"], updates), "adam": adam}, value

    @jax.jit
    def correct(params, images, labels):
        return (model.apply({"params": params}, enlarge(images)).argmax(-1) == labels).sum()

    state = init(jax.random.key(seed))
    history: list[dict[str, float]] = []
    if saved := read(out, rung, seed):
        state, history = serialization.from_state_dict(state, saved[0]), saved[1]
    while len(history) < epochs:
        start, losses = time.perf_counter(), []
        order = np.random.default_rng((seed, len(history))).permutation(len(fit))
        for rows in order[: len(order) // BATCH * BATCH].reshape(-1, BATCH):
            state, value = step(state, fit.images[rows], fit.labels[rows])
            losses.append(value)
        chunks = np.split(np.arange(len(test)), range(100, len(test), 100))
        hits = sum(int(correct(state["params"], test.images[c], test.labels[c])) for c in chunks)
        history.append(
            {
                "loss": float(np.mean(losses)),
                "accuracy": 100 * hits / len(test),
                "seconds": round(time.perf_counter() - start, 1),
            }
        )
        with atomic_replace(file) as temporary:
            content = {"state": serialization.to_state_dict(state), "history": json.dumps(history)}
            temporary.write_bytes(serialization.msgpack_serialize(content))
        print(rung, "seed", seed, "epoch", len(history), history[-1], flush=True)
    return state, history


def parameters(rung: str) -> int:
    """The number of parameters."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    return sum(
        leaf.size
        for leaf in jax.tree.leaves(jax.eval_shape(RUNGS[rung]().init, jax.random.key(0), image))
    )


def recorded(results: Path | None) -> dict[tuple[str, int], list[dict[str, float]]]:
    """The histories in a file of results, by rung and seed."""
    lines = read_lines(results) if results else []
    return {(line["rung"], line["seed"]): line["history"] for line in lines}


def finished(
    out: Path, rungs: Iterable[str], seeds: int, epochs: int = EPOCHS, results: Path | None = None
) -> tuple[dict[str, dict[int, list[dict[str, float]]]], list[str]]:
    """The histories of finished runs by rung and seed, and a line for each rung about those that are missing.

    They are those of `results`, and of runs under `out`.
    """
    known = recorded(results)
    found: dict[str, dict[int, list[dict[str, float]]]] = {}
    missing = []
    for rung in rungs:
        histories = {}
        for seed in range(seeds):
            saved = read(out, rung, seed)
            histories[seed] = known.get((rung, seed)) or (saved[1] if saved else [])
        found[rung] = {seed: h for seed, h in histories.items() if len(h) >= epochs}
        lacking = [
            f"seed {seed} ({len(history)} of {epochs} epochs)"
            for seed, history in histories.items()
            if seed not in found[rung]
        ]
        if lacking:
            missing.append(f"missing: {rung}, {', '.join(lacking)}")
    return found, missing


def report(out: Path, rungs: Iterable[str], seeds: int, results: Path | None = None) -> None:
    """Prints the finished runs as a table in Markdown, and which are missing."""
    found, missing = finished(out, rungs, seeds, results=results)
    print(
        "| rung | parameters | test accuracy (%) | published | seeds | seconds of the fastest epoch |"
    )
    print("|---|---|---|---|---|---|")
    for rung, histories in found.items():
        last = [history[-1]["accuracy"] for history in histories.values()]
        accuracy = f"{np.mean(last):.1f}" if last else ""
        deviation = f" ± {np.std(last, ddof=1):.1f}" if len(last) > 1 else ""
        seconds = [epoch["seconds"] for history in histories.values() for epoch in history]
        print(
            f"| {rung} | {parameters(rung):,} | {accuracy}{deviation} | {PUBLISHED.get(rung, '')} "
            f"| {len(last)} | {f'{min(seconds):.1f}' if seconds else ''} |"
        )
    print("", *missing, sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data_dir")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rungs", default=",".join(RUNGS))
    parser.add_argument("--out", type=Path, default=Path("runs/ladder"))
    parser.add_argument("--report", action="store_true", help="print the table, train nothing")
    args = parser.parse_args()
    rungs, results = args.rungs.split(","), RESULTS / "ladder.jsonl"
    if not args.report:
        args.out.mkdir(parents=True, exist_ok=True)
        data = load(args.data_dir)
        for seed in range(args.seeds):
            for rung in rungs:
                known = (rung, seed) in recorded(results)
                if known and seed:
                    continue
                _, history = train(rung, seed, data, args.out)
                if not known:
                    line = {"rung": rung, "seed": seed, "history": history, "jax": jax.__version__}
                    append_line(results, line)
    report(args.out, rungs, args.seeds, results)


if __name__ == "__main__":
    main()
