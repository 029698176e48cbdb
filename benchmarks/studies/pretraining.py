"""What pre-training without labels is worth with 1, 10 and 100 % of CIFAR-10's labels, at equal total time.

The network of `cifar10.py:small` with patches of 8 pixels starts from MAE, from DINO, or from its
initialisation. Pre-training takes as long as `PRETRAIN` supervised steps, by step times measured side by side
on the machine (the arm `step times`); `long scratch` trains for so many steps more instead. Labels are those of
the first images of the training split. Fine-tuning and training from scratch have the same settings.
"""

import json
import statistics
import time
from typing import Any

import jax
from ml_collections import ConfigDict

from cait_jax.sharding import batch_sharding, put_batch
from cait_jax.train.setup import build
from configs import dino, mae
from studies.runs import Arm, Job, Study, as_run, base_config, run

PRETRAIN = 6000
FINETUNE = {1: 500, 10: 1500, 100: 4000}  # steps by percent of the labels
MODEL = {"depth": 4, "width": 96, "num_heads": 2}
_ROUNDS = 9


def config_of(kind: str, job: Job, steps: int) -> ConfigDict:
    """`supervised`, `mae` or `dino`."""
    if kind == "supervised":
        config = base_config(job, steps)
    else:
        config = as_run({"mae": mae, "dino": dino}[kind].get_config("small"), job, steps)
        config.seed = job.seed
        config.batch_size = 128
    config.model.update(MODEL, patch_size=8, mlp_ratio=None, stacked=False)
    return config


def measure(job: Job) -> dict[str, Any]:
    """Seconds of a step of each kind: medians of rounds that alternate."""
    steps = {}
    for kind in ("supervised", "mae", "dino"):
        trainer = build(config_of(kind, job, steps=1000))
        batch = put_batch(next(trainer.train_batches()), batch_sharding(trainer.mesh))
        steps[kind] = (trainer, [trainer.init_state()], batch)
    seconds: dict[str, list[float]] = {kind: [] for kind in steps}
    for number in range(_ROUNDS + 1):
        for kind, (trainer, state, batch) in steps.items():
            began = time.perf_counter()
            state[0], metrics = trainer.train_step(state[0], batch)
            jax.block_until_ready((state[0], metrics))
            if number:  # the first compiles
                seconds[kind].append(time.perf_counter() - began)
    medians = {kind: statistics.median(found) for kind, found in seconds.items()}
    file = job.out / "step_times.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(medians))
    return {"diverged": False, "seconds": medians}


def pretrain(job: Job) -> dict[str, Any] | None:
    seconds = json.loads((job.out / "step_times.json").read_text())
    steps = round(PRETRAIN * seconds["supervised"] / seconds[job.name])
    return run(config_of(job.name, job, steps), job)


def classify(start: str, percent: int) -> Arm:
    def train(job: Job) -> dict[str, Any] | None:
        steps = FINETUNE[percent] + (PRETRAIN if start == "long scratch" else 0)
        config = config_of("supervised", job, steps)
        config.data.train_split = f"train[:{percent}%]"
        # A tenth of the steps, whatever the number of images.
        config.optimizer.warmup_epochs = FINETUNE[percent] / 10 * 128 / (500 * percent)
        if start in ("mae", "dino"):
            config.init.weights = str(Job(job.data_dir, job.out, start).workdir)
        return run(config, job)

    return Arm(train)


PRETRAINING = Study(
    "what is pre-training without labels worth at equal total time?",
    {
        "step times": Arm(measure, seeds=1),
        **{
            name: arm
            for start in ("mae", "dino", "scratch", "long scratch")
            for name, arm in (
                *([(start, Arm(pretrain, seeds=1))] if start in ("mae", "dino") else ()),
                *((f"{start}, {percent} %", classify(start, percent)) for percent in FINETUNE),
            )
        },
    },
)
