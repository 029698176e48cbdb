"""The seam of objectives: a second one, written against the protocol alone, goes through the one loop."""

import contextlib
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import struct
from trees import assert_same_bits

from cait_jax.train import train
from cait_jax.train.step import moving_average
from configs import digits


class Colour(nn.Module):
    """Images to their mean colour."""

    image_size: tuple[int, int] = (8, 8)
    in_channels: int = 1

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.in_channels)(images.reshape(images.shape[0], -1))


@struct.dataclass
class ConsistentColour:
    """Regresses the mean colour, and the prediction of a moving average of the parameters."""

    model: Colour = struct.field(pytree_node=False, default=Colour())
    rngs: ClassVar[tuple[str, ...]] = ("noise",)

    def init(self, key, images, params=None):
        params = self.model.init(key, images)["params"] if params is None else params
        return params, {"average": params, "error": jnp.zeros(())}

    def prepare(self, batch, keys):
        images = batch["image"].astype(jnp.float32) / 255
        noise = 0.1 * jax.random.normal(keys["noise"], images.shape)
        return {"image": images + noise, "colour": images.mean((1, 2))}

    def loss(self, params, carried, batch, keys, step):
        found = self.model.apply({"params": params}, batch["image"])
        taught = self.model.apply({"params": carried["average"]}, batch["image"])
        error = jnp.square(found - batch["colour"]).mean()
        return error + 0.1 * jnp.square(found - taught).mean(), {"metrics": {"error": error}}

    def update(self, carried, params, aux, step):
        average = moving_average(carried["average"], params, 0.9)
        return {"average": average, "error": aux["metrics"]["error"]}

    def evaluator(self, mesh):
        def evaluate(params, batches, progress=None):
            with batches:
                (batch,) = batches  # the whole split
            images = batch["image"].astype(np.float32)[batch["mask"]] / 255
            found = {n: self.model.apply({"params": p}, images) for n, p in params.items()}
            return {
                n: {"mse": float(jnp.square(f - images.mean((1, 2))).mean())}
                for n, f in found.items()
            }

        return evaluate


def test_another_objective_accumulates_stops_and_resumes_through_the_one_loop(
    tmp_path, monkeypatch
):
    config = digits.get_config()
    config.steps, config.batch_size, config.optimizer.grad_accum = 60, 64, 2
    config.optimizer.warmup_epochs, config.optimizer.learning_rate = 0.0, 3e-2
    config.checkpoint.every_steps = 10

    def make(config, split):
        return ConsistentColour()

    whole = train(config, tmp_path / "whole", make_objective=make)
    assert whole.metrics["eval/mse"] < 0.01
    assert 0 < float(whole.state.carried["error"]) < 0.1
    moved = jax.tree.map(
        lambda a, b: not np.array_equal(a, b), whole.state.params, whole.state.carried["average"]
    )
    assert all(jax.tree.leaves(moved))

    from cait_jax.train import loop

    stop = contextlib.nullcontext(lambda step: step == 15)
    monkeypatch.setattr(loop, "stop_signal", lambda: stop)
    assert not train(config, tmp_path / "parts", make_objective=make).finished
    monkeypatch.undo()
    resumed = train(config, tmp_path / "parts", make_objective=make)
    assert_same_bits(resumed.state, whole.state)
    assert resumed.metrics == pytest.approx(whole.metrics, abs=0)
