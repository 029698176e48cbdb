"""`cait sweep`: a recipe with every combination of some values."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import COUNT
from cait_jax.cli.output import check_writable, csv_lines, echo, note, table


@click.command(
    "sweep",
    short_help="Train a recipe with every combination of some values.",
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
    "--jobs", default=1, show_default=True, type=COUNT,
    help="Runs at a time. They share the cores, and take a GPU each.",
)  # fmt: skip
@click.pass_context
def command(ctx: click.Context, config: str, out: Path | None, jobs: int) -> None:
    """Train a recipe with every combination of the values of --config.KEY=A,B,C, one run after another.

    Of keys that take several numbers the values have semicolons between them, as in
    --config.augment.scale="0.08,1;0.35,1". Runs that differ in --config.seed alone are averaged. In the
    directory are the runs, table.md, table.csv and plot.png.

    The same command goes on where it was stopped; with other values it adds runs. A run that fails is named at the
    end, and the exit status is then 1.
    """
    from cait_jax.errors import UserError
    from cait_jax.explain.figures import require_matplotlib
    from cait_jax.files import run_folder
    from cait_jax.train.config import default_workdir, parse_command_line
    from cait_jax.train.sweep import grid, run_sweep, summary

    line = parse_command_line(ctx.args)
    if line.rest:
        raise UserError(
            f"{line.rest[0]!r} is no option of this command: keys vary by --config.KEY=A,B,C"
        )
    runs = grid(config, line.overrides)
    default = default_workdir(config)
    out = run_folder(out or default.with_name(f"sweep-{default.name}"))
    out.mkdir(parents=True, exist_ok=True)
    check_writable(out / "table.md", out / "table.csv", out / "plot.png")
    require_matplotlib(out / "plot.png")
    echo(f"{len(runs)} runs in {out}")
    failed: dict[str, str] = {}
    count = 0

    def finished(run: Any, result: dict[str, Any] | str) -> None:
        nonlocal count
        count += 1
        if isinstance(result, str):
            failed[run.name] = result
            note(f"{run.name} failed: {result}")
            return
        values = "  ".join(
            f"{name} {value:.4f}" for name, value in result["metrics"].items() if value is not None
        )
        echo(f"{run.name}: {values}  ({result['seconds']:.0f} s)")

    try:
        rows = run_sweep(config, runs, out, jobs=jobs, finished=finished)
    except KeyboardInterrupt:
        note("stopped: the same command goes on")
        ctx.exit(130)
    if not rows:
        raise UserError(f"no run has finished; their output is in {out}/*.log")
    found = summary(rows)
    _write(out, found, rows, len(runs))
    echo("\n" + table([_shown(row) for row in found]))
    best = {name: text for name, text in found[0].items() if name in rows[0]["varied"]}
    settings = {**runs[0].fixed, **best}
    flags = " ".join(shlex.quote(f"--config.{name}={text}") for name, text in settings.items())
    echo(f"\nthe best: python train.py --config={shlex.quote(config)} {flags}")
    if failed:
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed, such as {next(iter(failed))} "
            f"({next(iter(failed.values()))}): mend that, and the same command goes on"
        )


def _shown(row: Mapping[str, Any]) -> dict[str, str]:
    """A row of the table."""
    shown = {name: text for name, text in row.items() if name not in _FIGURES}
    mean, std = row["mean"], row["std"]
    value = "" if mean is None else f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
    best = "" if row["best"] is None else f"{row['best']:.4f}"
    return {**shown, row["metric"] or "metric": value, "best": best, "seeds": str(row["seeds"]),
            "seconds": f"{row['seconds']:.0f}"}  # fmt: skip


_FIGURES = ("metric", "mean", "std", "best", "seeds", "seconds")


def _write(
    out: Path, found: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], total: int
) -> None:
    from cait_jax.explain.curves import sweep_plot
    from cait_jax.explain.figures import save
    from cait_jax.files import atomic_replace

    missing = (
        f"\n\n{total - len(rows)} of {total} runs are missing.\n" if len(rows) < total else "\n"
    )
    for name, text in (
        ("table.md", table([_shown(row) for row in found], markdown=True) + missing),
        ("table.csv", csv_lines([list(found[0]), *(list(row.values()) for row in found)])),
    ):
        with atomic_replace(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    varied = [name for name in rows[0]["varied"] if name != "seed"]
    if found[0]["metric"] is not None and varied:
        save(sweep_plot(rows, varied, found[0]["metric"]), out / "plot.png")
