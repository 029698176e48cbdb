"""Where the transformer overtakes: 500 to 50,000 images of CIFAR-10, and a residual CNN beside it.

The network of `pretraining` from scratch and after MAE on all 50,000 images without their labels (trained there),
and a CNN of nine layers with batch norm. All see the same augmentation for the same steps.
"""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from cait_jax.data.split import Split
from cait_jax.evaluation.evaluate import (
    evaluate,
    jit_eval_step,
    loss_and_accuracy,
    make_eval_step,
    means,
    zero_sums,
)
from cait_jax.sharding import batch_sharding
from cait_jax.train.objectives.supervised import Supervised, correct, from_config
from studies.pretraining import config_of
from studies.runs import Arm, Job, Study, run

STEPS = 3000
SIZES = (500, 1_500, 5_000, 15_000, 50_000)


class ResidualCNN(nn.Module):
    """Images (batch, 32, 32, 3) to logits: eight convolutions of 3 x 3 in three stages, and a linear layer."""

    num_classes: int
    width: int = 24
    image_size: tuple[int, int] = (32, 32)
    in_channels: int = 3

    @nn.compact
    def __call__(self, x: Any, train: bool = False) -> Any:
        def convolve(x, width):
            x = nn.Conv(width, (3, 3), use_bias=False)(x)
            return nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))

        def residual(x, width):
            return x + convolve(convolve(x, width), width)

        x = convolve(x, self.width)
        x = nn.max_pool(convolve(x, 2 * self.width), (2, 2), (2, 2))
        x = residual(x, 2 * self.width)
        x = nn.max_pool(convolve(x, 4 * self.width), (2, 2), (2, 2))
        x = nn.max_pool(convolve(x, 8 * self.width), (2, 2), (2, 2))
        x = residual(x, 8 * self.width)
        return nn.Dense(self.num_classes)(x.max((1, 2)))


@struct.dataclass
class SupervisedCNN(Supervised):
    """`Supervised` for a network with batch norms, whose running averages are carried."""

    def init(self, key, images, params=None):
        variables = self.model.init(key, images)
        return variables["params"] if params is None else params, variables["batch_stats"]

    def loss(self, params, carried, batch, keys, step):
        del keys, step
        variables = {"params": params, "batch_stats": carried}
        logits, changed = self.model.apply(
            variables, batch["image"], train=True, mutable=["batch_stats"]
        )
        losses = self.label_loss(logits, batch["target"])
        accuracy = correct(logits, jnp.argmax(batch["target"], axis=-1)).mean()
        return losses.mean(), {"metrics": {"accuracy": accuracy}, **changed}

    def update(self, carried, params, aux, step):
        del carried, params, step
        return aux["batch_stats"]

    def evaluated(self, named, carried):
        return {"": {"params": named[""], "batch_stats": carried}}

    def evaluator(self, mesh):
        step = jit_eval_step(
            make_eval_step(self.model, self.mean, self.std, loss_and_accuracy), mesh
        )
        zeros = zero_sums(loss_and_accuracy, self.model.num_classes)

        def run(variables, batches, progress=None):
            (name,) = variables
            sums = evaluate(step, variables[name], batches, batch_sharding(mesh), zeros, progress)
            return {name: means(sums)}

        return run


def make_cnn(config: Any, split: Split) -> SupervisedCNN:
    objective = from_config(config, split)
    fields = {field.name: getattr(objective, field.name) for field in dataclasses.fields(objective)}
    return SupervisedCNN(**{**fields, "model": ResidualCNN(split.num_classes)})


def arm(kind: str, images: int) -> Arm:
    def train(job: Job) -> dict[str, Any] | None:
        config = config_of("supervised", job, STEPS)
        config.data.train_split = f"train[:{images}]"
        config.optimizer.warmup_epochs = STEPS / 10 * config.batch_size / images
        if kind == "after MAE":
            pretrained = Job(job.data_dir, job.out.parent / "pretraining", "mae")
            config.init.weights = str(pretrained.workdir)
        return run(config, job, **({"make_objective": make_cnn} if kind == "CNN" else {}))

    return Arm(train)


REGIME = Study(
    "where does the transformer overtake?",
    {
        f"{kind}, {images:,} images": arm(kind, images)
        for images in SIZES
        for kind in ("scratch", "after MAE", "CNN")
    },
)
