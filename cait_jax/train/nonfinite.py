"""Steps whose loss, gradient or result is not finite: skipped, then rolled back, then the run stops.

`step.make_train_step` skips such a step: of the state only its number changes. Here they are counted, by metrics
that every process has, and compared with the limits of `config.nonfinite`.
"""

import dataclasses
import math
from collections.abc import Mapping

from ml_collections import ConfigDict

from cait_jax.errors import Way, advise


class NonFiniteError(RuntimeError):
    """More steps were not finite than `config.nonfinite` allows, or the last evaluation was not."""


@dataclasses.dataclass
class NonFiniteSteps:
    """Counts of one run, which its checkpoints keep.

    Attributes:
      skipped: steps skipped in a row.
      rollbacks: in the whole run.
    """

    config: ConfigDict
    workdir: str
    skipped: int = 0
    rollbacks: int = 0
    _last: str = ""

    @property
    def counts(self) -> dict[str, int]:
        """For the metadata of a checkpoint."""
        return {"skipped": self.skipped, "rollbacks": self.rollbacks}

    def skip(self, step: int, values: Mapping[str, float]) -> str:
        """Counts a skipped step; a message for the log."""
        self.skipped += 1
        self._last = f"step {step}: loss {values['train/loss']:.4g}, gradient norm {values['train/grad_norm']:.4g}"
        return f"{self._last}: skipped ({self.skipped} in a row)"

    def roll_back(self, step: int, point: int) -> None:
        """Counts a rollback after a step to the checkpoint of another; 0: to the start.

        Raises:
          NonFiniteError: no more are allowed.
        """
        limits = self.config.nonfinite
        reason = self._last if self.skipped else f"step {step}: its new state is not finite"
        if self.rollbacks >= limits.rollbacks:
            allowed = f"the run was rolled back {limits.rollbacks} times already"
            if not limits.rollbacks:
                allowed = f"of such steps {limits.skips} in a row may be skipped"
            raise NonFiniteError(f"{reason}, and {allowed}: {self._advice(saved=point > 0)}")
        self.skipped, self.rollbacks = 0, self.rollbacks + 1

    def check_metrics(self, step: int, metrics: Mapping[str, float]) -> None:
        """Refuses to end well with a last evaluation that is not finite.

        Raises:
          NonFiniteError: naming the first such metric.
        """
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise NonFiniteError(
                    f"the evaluation of step {step} has {name} {value}: {self._advice(saved=True)}"
                )

    def _advice(self, *, saved: bool) -> str:
        clip = self.config.optimizer.grad_clip_norm
        ways = [Way("lower {}", "config.optimizer.learning_rate")]
        if clip is None or not 0 < clip <= 1:
            ways.append(Way("set {}", "config.optimizer.grad_clip_norm", 1))
        fewer = Way("let less learn, by {}", "what", "head")
        settings = advise(*ways, otherwise=advise(fewer, "take other weights"))
        weights = Way(", from the weights saved here by {}", "config.init.weights", self.workdir)
        return f"{settings}, and start anew in another --workdir{advise(weights) if saved else ''}"
