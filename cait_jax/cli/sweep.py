"""`cait sweep`: a recipe with every combination of some values."""

import datetime
import shlex
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cait_jax.cli.common import COUNT
from cait_jax.cli.output import check_writable, csv_lines, echo, note, table

if TYPE_CHECKING:
    from cait_jax.train.sweep.settings import SweepRun


@click.command(
    "sweep",
    short_help="Train a recipe with several values of its keys.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Example: cait sweep --config=configs/digits.py --config.optimizer.learning_rate=1e-3,3e-4 "
    "--config.seed=0,1,2",
)
@click.option("--config", required=True, metavar="FILE", help="A recipe, as for train.py.")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), metavar="DIR",
    help="Where the runs are, with table and plot; runs/sweep-RECIPE if not given.",
)  # fmt: skip
@click.option(
    "--trials", type=COUNT,
    help="Runs in all, drawn by Optuna from ranges and values instead of every combination.",
)  # fmt: skip
@click.option(
    "--jobs", default=1, show_default=True, type=COUNT,
    help="Runs at a time. They share the cores, and take a GPU each.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context, config: str, out: Path | None, trials: int | None, jobs: int
) -> None:
    """Train a recipe with every combination of the values of --config.KEY=A,B,C, one run after another.

    Of keys that take several numbers the values have semicolons between them, as in
    --config.augment.scale="0.08,1;0.35,1". Runs that differ in --config.seed alone are averaged. With --trials N a
    number may have a range, as in --config.optimizer.learning_rate=1e-4..1e-2:log, and the N runs are drawn.

    In the directory are the runs, and table.md, table.csv and plot.png of all that have finished there. The same
    command goes on where it was stopped; with other values it adds runs. A run that fails is named at the end,
    and the exit status is then 1.
    """
    from cait_jax.errors import UserError
    from cait_jax.explain.figures import require_matplotlib
    from cait_jax.files import run_folder
    from cait_jax.train.config import default_workdir, parse_command_line
    from cait_jax.train.sweep.results import read_rows, summary
    from cait_jax.train.sweep.runs import run_sweep
    from cait_jax.train.sweep.search import Search
    from cait_jax.train.sweep.settings import Range, grid, parse

    line = parse_command_line(ctx.args)
    if line.rest:
        raise UserError(
            f"{line.rest[0]!r} is no option of this command: keys vary by --config.KEY=A,B,C"
        )
    values = parse(line.overrides)
    default = default_workdir(config)
    out = run_folder(out or default.with_name(f"sweep-{default.name}"))
    if trials is None:
        listed = {name: each for name, each in values.items() if not isinstance(each, Range)}
        if ranges := sorted(values.keys() - listed.keys()):
            raise UserError(
                f"--config.{ranges[0]} has a range: give --trials N, or values with commas between them"
            )
        runs = grid(config, listed)
        rest = iter(runs)

        def ask(finished: Mapping[str, Mapping[str, Any]]) -> "SweepRun | None":
            return next((run for run in rest if run.digest not in finished), None)

    else:
        search = Search(config, values, trials, out)
        runs, ask = search.runs, search.next
    require_matplotlib(out / "plot.png")
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "table.md", out / "table.csv", out / "plot.png")
    total = len(runs) if trials is None else len(search)
    known = read_rows(out / "runs.jsonl")
    progress = _Progress(total, sum(run.digest in known for run in runs), jobs)
    echo(f"{total} runs in {out}" + (f", {progress.done} finished" if progress.done else ""))
    try:
        rows = run_sweep(config, ask, out, jobs=jobs, events=progress)
    except KeyboardInterrupt:
        note("stopped: the same command goes on")
        ctx.exit(130)
    if not rows:
        raise UserError(f"no run has finished; their output is in {out}/*.log")
    found = summary(rows)
    _write(out, found, rows, total - progress.done)
    echo("\n" + table([_shown(row) for row in found]))
    flags = " ".join(
        shlex.quote(f"--config.{name}={text}") for name, text in found[0]["overrides"].items()
    )
    echo(f"\nthe best: python train.py --config={shlex.quote(config)} {flags}")
    if progress.reasons:
        name, reason = next(iter(progress.reasons.items()))
        raise UserError(
            f"{len(progress.reasons)} of {total} runs failed, such as {name} ({reason}): mend that, and the same "
            "command goes on"
        )


class _Progress:
    def __init__(self, total: int, done: int, jobs: int) -> None:
        self.done, self.reasons = done, dict[str, str]()
        self._total, self._jobs, self._seconds = total, jobs, list[float]()

    def began(self, run: "SweepRun") -> None:
        """Names it."""
        echo(f"{run.name} ...")

    def progress(self, run: "SweepRun", line: str) -> None:
        """Passes its output on."""
        echo(f"{run.name}: {line}")

    def finished(self, run: "SweepRun", row: Mapping[str, Any]) -> None:
        """Its metrics, and how long the others will take."""
        self.done += 1
        self._seconds.append(row["seconds"])
        values = "  ".join(
            f"{name} {value:.4f}" for name, value in row["metrics"].items() if value is not None
        )
        left = self._total - self.done - len(self.reasons)
        seconds = statistics.mean(self._seconds) * left / min(self._jobs, left or 1)
        eta = f", ETA {datetime.timedelta(seconds=round(seconds))}" if left else ""
        echo(f"{run.name}: {values}  ({row['seconds']:.0f} s; {self.done} of {self._total}{eta})")

    def failed(self, run: "SweepRun", reason: str) -> None:
        """Why."""
        self.reasons[run.name] = reason
        note(f"{run.name} failed: {reason}")


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""
    shown = {name: text for name, text in row.items() if name not in _FIGURES}
    mean, std = row["mean"], row["std"]
    value = "" if mean is None else f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
    best = "" if row["best"] is None else f"{row['best']:.4f}"
    return {**shown, row["metric"] or "metric": value, "best": best, "seeds": str(row["seeds"]),
            "seconds": f"{row['seconds']:.0f}"}  # fmt: skip


_FIGURES = ("metric", "mean", "std", "best", "seeds", "seconds", "overrides")


def _write(
    out: Path, found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], missing: int
) -> None:
    from cait_jax.explain.curves import sweep_plot
    from cait_jax.explain.figures import save
    from cait_jax.files import atomic_replace
    from cait_jax.train.sweep.results import text_of, varied_keys

    columns = [name for name in found[0] if name != "overrides"]
    end = f"\n\n{missing} runs of the last command are missing.\n" if missing else "\n"
    for name, text in (
        ("table.md", table([_shown(row) for row in found], markdown=True) + end),
        ("table.csv", csv_lines([columns, *([row[name] for name in columns] for row in found)])),
    ):
        with atomic_replace(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    varied = varied_keys(rows)
    if found[0]["metric"] is not None and varied:
        points = [
            {
                "varied": {key: text_of(row["config"].get(key)) for key in varied},
                "metrics": row["metrics"],
            }
            for row in rows
        ]
        save(sweep_plot(points, varied, found[0]["metric"]), out / "plot.png")
