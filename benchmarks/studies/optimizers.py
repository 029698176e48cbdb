"""What is best for an hour on two cores: optimisers and rates on ten minutes of `cifar10.py:small`.

Trained on nine tenths of the training images and evaluated on the last: a choice by this table has not seen the
test images. Schedule-free optimisers are left out: what they evaluate is neither the parameters nor an average
that the loop keeps.
"""

from typing import Any

from configs import cifar10
from studies.runs import Arm, Job, Study, as_run, run

STEPS = 2500


def arm(**settings: Any) -> Arm:
    """`cifar10.py:small` with some keys of `optimizer`."""

    def train(job: Job) -> dict[str, Any] | None:
        config = cifar10.get_config("small")
        config.seed = job.seed
        config.data.train_split, config.data.eval_split = "train[:90%]", "train[90%:]"
        config.optimizer.warmup_epochs = 0.3
        config.optimizer.update(settings)
        return run(as_run(config, job, STEPS), job)

    return Arm(train)


OPTIMIZERS = Study(
    "what is best for an hour on two cores?",
    {
        f"{name} {rate:g}": arm(name=name, learning_rate=rate, **settings)
        for name, rates, settings in (
            ("adamw", (5e-4, 1e-3, 2e-3), {}),
            ("lion", (5e-5, 1e-4, 2e-4), {"b2": 0.99, "weight_decay": 0.5}),
            ("lamb", (2.5e-3, 5e-3, 1e-2), {}),
            ("sgd", (0.05, 0.1, 0.2), {"weight_decay": 5e-4, "nesterov": True}),
            ("muon", (1e-3, 2e-3, 4e-3), {}),
        )
        for rate in rates
    },
)
