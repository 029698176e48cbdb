"""Small trainings on the digits, what they save, and steps of them that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
from trees import random_params

from cait_jax.checkpoint.store import Checkpoints
from cait_jax.train import loop
from cait_jax.train.config import as_json
from cait_jax.train.step import create_state
from configs import digits


def small_digits():
    """A config of a few steps of a network of two blocks, evaluated every 4 steps and saved every 2."""
    config = digits.get_config()
    config.batch_size = 32
    config.model.width = 16
    config.model.depth = 1
    config.model.class_depth = 1
    config.model.num_heads = 2
    config.eval.every_epochs = 4 * 32 / 1437
    config.checkpoint.every_steps = 2
    return config


def save_run(workdir, model, *, steps=(1,), ema=False, metrics=None, **meta):
    """Checkpoints as the loop writes them, without the training."""
    config = digits.get_config()
    for name in ("depth", "width", "num_heads"):
        config.model[name] = getattr(model, name)
    config.optimizer.ema_decay = 0.99 if ema else 0.0
    config.eval.crop_pct = 0.875
    with Checkpoints(workdir / "checkpoints") as checkpoints:
        for step in steps:
            state = create_state(random_params(model, seed=step), optax.adamw(1e-3), ema=ema)
            if ema:
                state = dataclasses.replace(state, ema=random_params(model, seed=step + 100))
            checkpoints.save(step, state, {"config": as_json(config), **meta})
            if metrics:
                checkpoints.record(step, metrics)


def poison(monkeypatch, spoil):
    """Has `spoil(number, state, batch)` give state and batch of each step, before it is taken."""
    build = loop.build

    def poisoned(*args, **kwargs):
        trainer = build(*args, **kwargs)

        def step(state, batch, objective):
            return trainer.step(*spoil(int(state.step) + 1, state, batch), objective)

        return dataclasses.replace(trainer, step=step)

    monkeypatch.setattr(loop, "build", poisoned)


def nan_params(*numbers):
    """For `poison`: steps whose parameters are NaN, and with them loss and gradient."""

    def spoil(number, state, batch):
        if number in numbers:
            nan = jax.tree.map(lambda leaf: leaf * jnp.nan, state.params)
            state = dataclasses.replace(state, params=nan)
        return state, batch

    return spoil


def nan_images(*numbers):
    """For `poison`: steps whose images are NaN."""

    def spoil(number, state, batch):
        if number in numbers:
            batch = {**batch, "image": batch["image"] * jnp.float32(jnp.nan)}
        return state, batch

    return spoil
