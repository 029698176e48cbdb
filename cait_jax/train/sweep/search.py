"""Runs drawn from ranges by Optuna's tree-structured Parzen estimator (Bergstra et al., 2011).

What is drawn is a function of the finished runs, of those that are under way, and of the number of the trial; so a
sweep that was stopped draws what it would have drawn. OUT/trials.jsonl has a line for each trial.
"""

import importlib.util
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cait_jax.errors import UserError
from cait_jax.train.config import read
from cait_jax.train.keys import KEYS
from cait_jax.train.sweep.results import METRICS, append_row, metric_of, read_rows
from cait_jax.train.sweep.settings import SEED, Range, SweepRun, resolve


class Search:
    """Asks for the trials of a sweep, one at a time."""

    def __init__(
        self, file: str, values: Mapping[str, list[str] | Range], trials: int, out: Path
    ) -> None:
        """Checks recipe, ranges and values.

        Args:
          trials: in all, with those of earlier commands in `out` that searched the same keys.

        Raises:
          UserError: for what does not fit, or without Optuna.
        """
        if importlib.util.find_spec("optuna") is None:
            raise UserError('ranges are searched by Optuna: pip install "cait-jax[sweep]"')
        self._file, self._values, self._trials = file, values, trials
        self._searched = [
            name for name, each in values.items() if isinstance(each, Range) or len(each) > 1
        ]
        if not self._searched:
            raise UserError(
                "nothing varies: give a range, such as --config.optimizer.learning_rate=1e-4..1e-2:log"
            )
        if SEED in self._searched:
            raise UserError(
                "--trials is of one seed: give --config.seed one value, and compare seeds afterwards"
            )
        ends = {
            name: [each.text(each.low), each.text(each.high)] if isinstance(each, Range) else each
            for name, each in values.items()
        }
        firsts = {name: texts[0] for name, texts in ends.items()}
        for texts in itertools.zip_longest(*ends.values()):
            given = {name: text for name, text in zip(ends, texts, strict=True) if text is not None}
            first = resolve(file, firsts | given, self._searched)
        self._base = self._without_searched(first.config)
        self._path = out / "trials.jsonl"
        asked = {
            digest: row
            for digest, row in read_rows(self._path, ("digest", "overrides", "config")).items()
            if self._without_searched(row["config"]) == self._base
        }
        self.runs = [resolve(file, row["overrides"], self._searched) for row in asked.values()]
        self._given: set[str] = set()

    def __len__(self) -> int:
        """Trials in all."""
        return max(self._trials, len(self.runs))

    def next(self, finished: Mapping[str, Mapping[str, Any]]) -> SweepRun | None:
        """The next run: one that was asked for and has not finished, else a new one; None if there are enough.

        Args:
          finished: rows by digest.
        """
        for run in self.runs:
            if run.digest not in self._given | finished.keys():
                self._given.add(run.digest)
                return run
        while len(self.runs) < self._trials:
            params = self._suggest(finished)
            overrides = {
                name: each[0] if isinstance(each, list) else ""
                for name, each in self._values.items()
            } | params
            run = resolve(self._file, overrides, self._searched)
            append_row(
                self._path,
                {"digest": run.digest, "overrides": overrides, "config": dict(run.config)},
            )
            self.runs.append(run)
            if run.digest not in self._given | finished.keys():  # words and whole numbers repeat
                self._given.add(run.digest)
                return run
        return None

    def _without_searched(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key not in self._searched}

    def _suggest(self, finished: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
        import optuna
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )
        from optuna.trial import TrialState, create_trial

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        space: dict[str, Any] = {}
        for name in self._searched:
            each = self._values[name]
            if not isinstance(each, Range):
                space[name] = CategoricalDistribution(each)
            elif each.whole:
                space[name] = IntDistribution(int(each.low), int(each.high), log=each.log)
            else:
                space[name] = FloatDistribution(each.low, each.high, log=each.log)

        known = [
            row for row in finished.values() if self._without_searched(row["config"]) == self._base
        ]
        metric = next(
            (metric_of(row["metrics"]) for row in known if metric_of(row["metrics"])), None
        )
        study = optuna.create_study(
            direction="minimize" if metric and METRICS[metric] is min else "maximize",
            sampler=optuna.samplers.TPESampler(seed=len(self.runs), constant_liar=True),
        )
        trials = [(row["overrides"], row["metrics"].get(metric)) for row in known]
        trials += [(run.overrides, None) for run in self.runs if run.digest not in finished]
        for overrides, value in trials:
            if params := self._params(overrides):
                state = TrialState.RUNNING if value is None else TrialState.COMPLETE
                study.add_trial(
                    create_trial(state=state, params=params, distributions=space, value=value)
                )
        drawn = study.ask(space).params
        return {
            name: each.text(drawn[name])
            if isinstance(each := self._values[name], Range)
            else drawn[name]
            for name in self._searched
        }

    def _params(self, overrides: Mapping[str, str]) -> dict[str, Any]:
        """Values of the searched keys; none of a run that is not among those searched."""
        found: dict[str, Any] = {}
        for name in self._searched:
            each, text = self._values[name], overrides.get(name)
            if text is None:
                return {}
            if isinstance(each, Range):
                found[name] = value = read(KEYS[name].kind, text)
                fits = each.low <= value <= each.high
            else:
                found[name], fits = text, text in each
            if not fits:
                return {}
        return found
