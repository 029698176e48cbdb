"""`cait plot`: curves of training runs, drawn once or while a run goes on."""

import base64
import functools
import io
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import Finite
from cait_jax.cli.output import check_writable, echo
from cait_jax.errors import UserError, one_line, printable
from cait_jax.reading import check_regular

MAX_METRICS = 2**30  # bytes of a metrics.jsonl
_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta http-equiv="refresh" content="{every}">
<title>{title}</title>
<style>body {{ font: 15px system-ui, sans-serif; margin: 1.5rem; }} img {{ max-width: 100%; }}</style>
<h1>{title}</h1><p>Drawn at {time}; drawn again every {every} s while <code>cait plot --watch</code> runs.</p>
{pictures}
</html>
"""


@click.command(
    "plot",
    short_help="Loss, accuracy, learning rate and gradient norm of training runs, also live.",
    epilog="Example: cait plot runs/a runs/b -o curves.png",
)
@click.argument("runs", nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="A .png, .svg or .pdf; with --watch an .html.  [default: curves.png, RUN/curves.html]",
)  # fmt: skip
@click.option("--layer-scale", is_flag=True, help="LayerScale by block and channel, of one run.")
@click.option(
    "--branch-ratio", is_flag=True, help="Norms of residual branches by block, of one run."
)
@click.option("--watch", is_flag=True, help="Refresh an HTML page until interrupted.")
@click.option(
    "--every", type=Finite(0.1, 3600), default=10.0, show_default=True, metavar="SECONDS",
    help="Between refreshments of --watch.",
)  # fmt: skip
def command(
    runs: tuple[str, ...],
    output: Path | None,
    layer_scale: bool,
    branch_ratio: bool,
    watch: bool,
    every: float,
) -> None:
    """Draw the metrics of each RUN, a directory of training.

    --layer-scale and --branch-ratio show what a run with report.inspect_every recorded.
    """
    from cait_jax.explain.figures import require_matplotlib, save

    require_matplotlib()
    paths = [Path(run) for run in runs]
    chosen = [
        part
        for part, given in (("layer_scale", layer_scale), ("branch_ratio", branch_ratio))
        if given
    ]
    if len(chosen) == 2 and not watch:
        raise click.UsageError("--layer-scale and --branch-ratio are two pictures: ask for one")
    if chosen and len(paths) > 1:
        raise click.UsageError(f"--{chosen[0].replace('_', '-')} takes one RUN")
    drawings = [functools.partial(_inspected, paths[0], part) for part in chosen]
    if watch or not chosen:
        drawings.insert(0, functools.partial(_curves, paths))
    if not watch:
        output = Path("curves.png") if output is None else output
        check_writable(output)
        require_matplotlib(output)
        echo(str(save(drawings[0](), output)))
        return
    output = paths[0] / "curves.html" if output is None else output
    if output.suffix != ".html":
        raise UserError(f"{output} must end in .html with --watch")
    check_writable(output)
    title = ", ".join(path.name for path in paths)
    _watch(drawings, output, title, every)


def _watch(drawings: Sequence[Callable[[], Any]], output: Path, title: str, every: float) -> None:
    """Writes the page again and again until interrupted."""
    from cait_jax.files import atomic_replace

    echo(f"{output}: open it in a browser; Ctrl-C ends")
    try:
        while True:
            pictures = []
            for draw in drawings:
                svg = io.BytesIO()
                draw().savefig(svg, format="svg")
                data = base64.b64encode(svg.getvalue()).decode()
                pictures.append(f'<p><img alt="curves" src="data:image/svg+xml;base64,{data}"></p>')
            page = _PAGE.format(
                title=printable(title).replace("&", "&amp;").replace("<", "&lt;"),
                every=f"{every:g}",
                time=time.strftime("%H:%M:%S"),
                pictures="\n".join(pictures),
            )
            with atomic_replace(output) as temporary:
                temporary.write_text(page, encoding="utf-8")
            time.sleep(every)
    except KeyboardInterrupt:
        return


def _curves(runs: Sequence[Path]) -> Any:
    from cait_jax.explain.curves import training_curves
    from cait_jax.train.metrics import read_metrics

    rows = {}
    for run in runs:
        file = run / "metrics.jsonl"
        if not file.is_file():
            raise UserError(
                f"{run} is not a training run: there is no metrics.jsonl in it; give a --workdir"
            )
        try:
            check_regular(file, MAX_METRICS)
            rows[str(run)] = read_metrics(file)
        except (OSError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or "it nests too deeply"
            raise UserError(f"{file} cannot be read: {reason}; restore it") from error
        _check_rows(file, rows[str(run)])
    return training_curves(rows)


def _check_rows(file: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from cait_jax.train.config import fits
    from cait_jax.train.keys import FROM_0, Number

    if not any(len(row) > 1 for row in rows):
        raise UserError(f"{file} holds no metrics yet: wait for the run's first line")
    for row in rows:
        for name, value in row.items():
            right = (
                fits(FROM_0, value) if name == "step" else value is None or fits(Number(), value)
            )
            if not right:
                raise UserError(
                    f"{file} is damaged: {name} of a row is {one_line(repr(value)[:80])}; restore it"
                )


def _inspected(run: Path, part: str) -> Any:
    """The picture of what `report.inspect_every` recorded."""
    import numpy as np

    from cait_jax.explain import curves

    files = sorted((run / "inspect").glob("*.npz"))
    if not files:
        raise UserError(f"{run} has no records: train it with --config.report.inspect_every=100")
    try:
        steps = [int(file.stem) for file in files]
        records = [dict(np.load(file)) for file in files]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(
            f"the records in {run / 'inspect'} are damaged ({error}): remove the broken ones"
        ) from error
    if part == "branch_ratio":
        return curves.branch_ratios(steps, np.stack([r["branch_ratio"] for r in records]))
    names = [name for name in records[0] if name.startswith("layer_scale")]
    if not names:
        raise UserError(f"the network of {run} has no LayerScale: see --branch-ratio")
    return curves.layer_scales(steps, {n: np.stack([r[n] for r in records]) for n in names})
