"""Numbers as options take them: finite, and in a range that makes sense."""

from typing import Any

import click


class Finite(click.FloatRange):
    """A number that is neither NaN nor infinite, as `click.FloatRange` lets them pass."""

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """The number; click's own error for any other."""
        number = super().convert(value, param, ctx)
        if number - number != 0:
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


COUNT = click.IntRange(1, 2**20)  # images at a time
SIDE = click.IntRange(1, 2**14)  # pixels
WORKERS = click.IntRange(0, 1024)  # processes
SEED = click.IntRange(0, 2**32 - 1)  # as config.seed
EPOCHS = Finite(0, 1e6, min_open=True)  # as config.epochs
