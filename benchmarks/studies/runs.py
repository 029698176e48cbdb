"""A run of a study: its config, and what is kept of it."""

import dataclasses
import itertools
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from cait_jax.train import NonFiniteError, train
from cait_jax.train.metrics import read_metrics
from configs import cifar10

STEPS = 1170  # 3 passes over the 50,000 images
_LAST = 100  # steps whose mean is a run's training loss


@dataclasses.dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
      data_dir: of TFDS.
      out: of the study.
      name: of the arm.
    """

    data_dir: str
    out: Path
    name: str
    seed: int = 0

    @property
    def workdir(self) -> Path:
        """Where it trains."""
        return self.out / self.name / f"seed{self.seed}"


@dataclasses.dataclass(frozen=True)
class Arm:
    """What a study compares.

    Attributes:
      run: what is kept of a run; None if it was stopped.
      seeds: None: as many as are asked for.
    """

    run: Callable[[Job], dict[str, Any] | None]
    seeds: int | None = None


@dataclasses.dataclass(frozen=True)
class Study:
    """Arms by name, in the order in which they run."""

    question: str
    arms: dict[str, Arm]


def base_config(job: Job, steps: int = STEPS) -> ConfigDict:
    """Width 64, patches of 8 pixels, batches of 128, AdamW at 1e-3; the last step is evaluated."""
    config = cifar10.get_config("small")
    config.seed = job.seed
    config.batch_size = 128
    config.model.update(width=64, num_heads=4, patch_size=8, stacked=True)
    config.optimizer.warmup_epochs = 0.3
    return as_run(config, job, steps)


def as_run(config: ConfigDict, job: Job, steps: int) -> ConfigDict:
    """A recipe of so many steps, whose last is evaluated."""
    config.steps = steps
    config.data.data_dir = job.data_dir
    config.eval.every_epochs = 1e9
    config.checkpoint.every_steps = 200
    config.report.every_steps = 10
    return config


def run(config: ConfigDict, job: Job, **objective: Any) -> dict[str, Any] | None:
    """Trains, or goes on with it; what is kept of it. None if it was stopped by a signal.

    `objective` is `train`'s `make_objective`.
    """
    try:
        done = train(config, job.workdir, **objective)
    except NonFiniteError:
        done = None
    if done is not None and not done.finished:
        return None
    rows = [row for row in read_metrics(job.workdir / "metrics.jsonl") if "train/loss" in row]
    last = [row["train/loss"] for row in rows if row["step"] > config.steps - _LAST]
    metrics = {} if done is None else done.metrics
    return {
        "diverged": done is None,
        "accuracy": metrics.get("eval/accuracy"),
        "eval_loss": metrics.get("eval/loss"),
        "train_loss": None if done is None else statistics.mean(last),
        "grad_norm": statistics.median(row["train/grad_norm"] for row in rows),
        "parameters": done and sum(leaf.size for leaf in jax.tree.leaves(done.state.params)),
        "steps": rows[-1]["step"],
        "seconds_a_step": _seconds_a_step(rows),
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "jax": jax.__version__,
    }


def _seconds_a_step(rows: list[dict[str, Any]]) -> float | None:
    """The median over lines of the log, so that saves and stops do not count; None if there is one line."""
    pairs = itertools.pairwise(rows)
    seconds = [(b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs]
    return statistics.median(seconds) if seconds else None
