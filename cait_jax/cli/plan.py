"""`cait plan`: memory, operations and least time of a config's training step on given chips."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cait_jax.cli import output

if TYPE_CHECKING:
    from ml_collections import ConfigDict

    from cait_jax.plan.plan import Plan

GB = 1e9


@click.command(
    "plan",
    short_help="What a config's training step needs on a TPU pod or on GPUs.",
    context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    epilog="Example: cait plan --config=configs/cait_xs24.py --topology=v5e:4x8 --config.batch_size=2048",
)
@click.option(
    "--config", "configs", required=True, multiple=True, metavar="FILE",
    help="A recipe, as for train.py; several make a table.",
)  # fmt: skip
@click.option(
    "--topology", "topologies", required=True, multiple=True, metavar="CHIP:SHAPE",
    help="TPUs v5e:4x8, v5p:4x4x8, v6e:16x16; GPUs h100:8, a100:4x8 (machines x GPUs). Several make a table.",
)  # fmt: skip
@click.option(
    "--estimate", is_flag=True, help="Trace and count a GPU's step in place of compiling it."
)
@click.option(
    "--largest", is_flag=True, help="Look for the largest batch too: two or three more sizes."
)
@click.option(
    "--traffic", is_flag=True, help="What a compiled step's bytes to and from memory stem from."
)
@click.option(
    "--weak-scaling", is_flag=True,
    help="On paper: what as many images on each of 1 to 1,024 chips exchange, by link speed.",
)  # fmt: skip
@click.option(
    "--strong-scaling", is_flag=True,
    help="Hours of the run, chip-hours and cores for decoding, on each topology and up to one image a chip.",
)  # fmt: skip
@click.option(
    "--examples", type=click.IntRange(1, 10**12), default=1_281_167, show_default="ImageNet-1k's 1281167",
    help="Training images in an epoch, for --strong-scaling.",
)  # fmt: skip
@click.option("--json", "json", is_flag=True, help="Print JSON.")
@click.option("--markdown", is_flag=True, help="Print a Markdown table.")
@click.option(
    "--cache", type=click.Path(path_type=Path), metavar="DIR",
    help="Where compiled programs are kept; ~/.cache/cait_jax/plan if not given.",
)  # fmt: skip
@click.pass_context
def command(
    ctx: click.Context,
    configs: tuple[str, ...],
    topologies: tuple[str, ...],
    estimate: bool,
    largest: bool,
    traffic: bool,
    weak_scaling: bool,
    strong_scaling: bool,
    examples: int,
    json: bool,
    markdown: bool,
    cache: Path | None,
) -> None:
    """Say what one training step needs of a TPU pod or of GPUs that are not here.

    The very step is compiled, with the target's own compiler on this CPU: a minute or more each, and nothing the
    second time. For GPUs, with --estimate or without JAX's CUDA plugin, it is traced and its work counted.
    --config.KEY=VALUE changes the config as for train.py. The least time is that of published rates; no run will
    be faster, most are slower.
    """
    import jax

    from cait_jax.plan.plan import make_plan
    from cait_jax.plan.roofline import parse_topology

    jax.config.update("jax_platforms", "cpu")  # the step is compiled or traced on the host
    wanted = [parse_topology(text) for text in topologies]
    recipes = [(Path(file).stem, read_config(file, ctx.args)) for file in configs]
    rows = []
    for name, config in recipes:
        for topology in wanted:

            def say(message: str, about: str = f"{name} on {topology}") -> None:
                click.echo(f"{about}: {message}", err=True)

            plan = make_plan(
                config, topology, largest=largest, estimate=estimate, folder=cache, say=say
            )
            rows.append((name, plan))
    if traffic:
        for name, plan in rows:
            click.echo(traffic_of(name, plan, markdown=markdown))
    elif weak_scaling:
        for name, plan in rows:
            click.echo(scaling_of(name, plan, markdown=markdown))
    elif strong_scaling:
        for number, (name, config) in enumerate(recipes):
            plans = [plan for _, plan in rows[number * len(wanted) : (number + 1) * len(wanted)]]
            click.echo(runs_of(name, config, plans, examples, markdown=markdown))
    elif json:
        click.echo(output.as_json([as_record(name, plan) for name, plan in rows]))
    elif len(rows) == 1:
        facts = [{"what": what, "value": value} for what, value in facts_of(*rows[0])]
        click.echo(output.table(facts, markdown=markdown))
    else:
        click.echo(output.table([row_of(name, plan) for name, plan in rows], markdown=markdown))


def read_config(file: str, arguments: list[str]) -> "ConfigDict":
    """A config file with overrides such as `["--config.batch_size=256"]`, as train.py takes them.

    Raises:
      UserError: there is no such file or key.
    """
    from cait_jax.errors import UserError
    from cait_jax.train.config import load_config, parse_command_line

    line = parse_command_line(arguments)
    if line.rest or line.file is not None:
        unknown = line.rest[0] if line.rest else f"--config={line.file}"
        raise UserError(f"unknown argument {unknown}: see cait plan --help")
    return load_config(file, line.overrides)


def facts_of(name: str, plan: "Plan") -> list[tuple[str, str]]:
    """One plan as (what, value) rows."""
    from cait_jax.plan.hlo import totals

    topology, chip, bounds = plan.topology, plan.topology.chip, plan.roofline
    estimate = "" if plan.compiled else " (estimate)"
    facts = [
        ("config", name),
        ("chips", f"{topology.chips} {chip.name}, {str(topology).partition(':')[2]}"),
        ("images a step", f"{plan.batch_size:,}, {plan.by_chip:g} a chip"),
        ("state on a chip", f"{plan.state / GB:.2f} GB"),
        (f"memory of a step on a chip{estimate}", f"{plan.memory / GB:.2f} GB"),
        ("fits", _fits(plan)),
        ("operations of a chip", f"{plan.operations / 1e12:.3f} T"),
    ]
    if plan.traffic is not None and plan.exchanged is not None and bounds is not None:
        facts += [
            (f"bytes to and from its memory{estimate}", f"{plan.traffic / GB:.1f} GB"),
            *(
                (f"{kind}{estimate}", f"{count} times, {size / 1e6:.1f} MB")
                for kind, (count, size) in totals(list(plan.exchanged)).items()
            ),
            ("least time for operations", f"{bounds.compute * 1e3:.2f} ms"),
            (f"least time for memory{estimate}", f"{bounds.memory * 1e3:.2f} ms"),
            (f"least time for exchange{estimate}", f"{bounds.exchange * 1e3:.2f} ms"),
            (f"least time of a step{estimate}", f"{bounds.seconds * 1e3:.2f} ms"),
            ("images a second, at most", f"{plan.batch_size / bounds.seconds:,.0f}"),
            ("utilisation, at most", f"{plan.utilisation:.1%}"),
        ]
    if plan.largest is not None:
        found = plan.largest
        facts += [
            (f"largest batch{estimate}", _largest(plan)),
            ("its memory on a chip", f"{found.memory / GB:.2f} GB"),
            ("memory by image", f"{found.by_image / GB:.3f} GB, beside {found.fixed / GB:.2f} GB"),
        ]
    if plan.kernels is not None:
        facts.append(("kernels launched", f"{plan.kernels:,}"))
    if plan.compiled:
        facts.append(("compiling took", f"{plan.seconds:.0f} s"))
    return facts


def row_of(name: str, plan: "Plan") -> dict[str, Any]:
    """One plan as a row of the table of several."""
    bounds = plan.roofline
    row = {
        "config": name,
        "chips": str(plan.topology),
        "a chip": f"{plan.by_chip:g}",
        "memory (GB)": f"{plan.memory / GB:.1f}",
        "fits": "yes" if plan.fits else "no",
        "operations (T)": f"{plan.operations / 1e12:.2f}",
        "bytes (GB)": bounds and f"{(plan.traffic or 0) / GB:.1f}",
        "compute (ms)": bounds and f"{bounds.compute * 1e3:.1f}",
        "memory (ms)": bounds and f"{bounds.memory * 1e3:.1f}",
        "exchange (ms)": bounds and f"{bounds.exchange * 1e3:.2f}",
        "images/s": bounds and f"{plan.batch_size / bounds.seconds:,.0f}",
        "utilisation": bounds and f"{plan.utilisation:.0%}",
    }
    if plan.largest is not None:
        row["largest batch"] = _largest(plan)
    return row


def traffic_of(name: str, plan: "Plan", *, markdown: bool) -> str:
    """A table of a step's memory traffic by origin, under its total."""
    if plan.traffic is None or plan.origins is None:
        return f"{name} on {plan.topology}: no program to read"
    rows = [
        {"what": origin, "GB": f"{size / GB:.2f}", "share": f"{size / plan.traffic:.0%}"}
        for origin, size in plan.origins.items()
        if size > 0.005 * plan.traffic
    ]
    whole = f"{plan.traffic / GB:.1f} GB a step and chip"
    table = output.table(rows, markdown=markdown)
    return f"{name} on {plan.topology}, {plan.by_chip:g} images a chip: {whole}\n\n{table}\n"


def scaling_of(name: str, plan: "Plan", *, markdown: bool) -> str:
    """A table of collectives' time by number of chips and link bandwidth, under a chip's own time."""
    from cait_jax.plan.roofline import CHIP_COUNTS, RATES, exchange_seconds, free_until

    if plan.exchanged is None or plan.roofline is None:
        return f"{name} does not fit {plan.topology}: nothing to scale"
    own = max(plan.roofline.compute, plan.roofline.memory)
    rows: list[dict[str, Any]] = [
        {"chips": f"{chips:,}"}
        | {
            f"{rate / GB:g} GB/s": f"{1e3 * exchange_seconds(plan.exchanged, chips, rate):.2f}"
            for rate in RATES
        }
        for chips in CHIP_COUNTS
    ]
    free = [f"{free_until(plan.exchanged, own, rate):,}" for rate in RATES]
    rows.append(dict(zip(rows[0], ["free until", *free], strict=True)))
    images = f"{plan.by_chip:g} images a chip"
    return (
        f"{name}, {images}: {own * 1e3:.1f} ms of a chip's own work (at least); exchange in ms\n\n"
        f"{output.table(rows, markdown=markdown)}\n"
    )


def runs_of(
    name: str, config: "ConfigDict", plans: "list[Plan]", examples: int, *, markdown: bool
) -> str:
    """A table of the config's run by number of chips, under its length."""
    from cait_jax.plan.scaling import IMAGES_A_CORE, strong_scaling
    from cait_jax.train.optimizer import steps_of

    steps = steps_of(config, examples)
    images = steps * config.batch_size
    scaled = strong_scaling(plans)
    first = scaled[0].hours(images) * scaled[0].chips
    rows = [
        {
            "chips": f"{each.chips:,}" + ("" if each.planned else " (line)"),
            "a chip": f"{each.batch_size / each.chips:g}",
            "compute (ms)": f"{each.bounds.compute * 1e3:.2f}",
            "memory (ms)": f"{each.bounds.memory * 1e3:.2f}",
            "exchange (ms)": f"{each.bounds.exchange * 1e3:.2f}",
            "images/s": f"{each.images_per_second:,.0f}",
            "hours": f"{each.hours(images):.2f}",
            "chip-hours": f"{each.hours(images) * each.chips:,.0f}",
            "efficiency": f"{first / (each.hours(images) * each.chips):.0%}",
            "cores": f"{each.images_per_second / IMAGES_A_CORE:,.0f}",
        }
        for each in scaled
    ]
    return (
        f"{name}, {config.batch_size:,} images a step, {steps:,} steps: least hours, and the cores that decode as "
        f"fast at {IMAGES_A_CORE:.0f} images a second each\n\n{output.table(rows, markdown=markdown)}\n"
    )


def as_record(name: str, plan: "Plan") -> dict[str, Any]:
    """One plan for JSON: bytes, operations and seconds."""
    from cait_jax.plan.hlo import totals

    bounds, largest = plan.roofline, plan.largest
    return {
        "config": name,
        "topology": str(plan.topology),
        "batch_size": plan.batch_size,
        "estimate": not plan.compiled,
        "state_bytes": plan.state,
        "memory_bytes": plan.memory,
        "fits": plan.fits,
        "operations": plan.operations,
        "useful_operations": plan.useful,
        "traffic_bytes": plan.traffic,
        "collectives": None if plan.exchanged is None else totals(list(plan.exchanged)),
        "seconds": bounds
        and {"compute": bounds.compute, "memory": bounds.memory, "exchange": bounds.exchange},
        "utilisation": plan.utilisation,
        "kernels": plan.kernels,
        "largest_batch": largest and largest.batch * plan.topology.chips,
        "compile_seconds": plan.seconds,
    }


def _fits(plan: "Plan") -> str:
    room = f"{plan.topology.chip.memory / GB:.2f} GB"
    if plan.fits:
        return f"yes, in {room}"
    advice = "a smaller batch, --config.model.remat=block, --config.mesh.fsdp or more chips"
    return f"no: a chip has {room}; try {advice}"


def _largest(plan: "Plan") -> str:
    assert plan.largest is not None
    batch = plan.largest.batch
    return f"{batch * plan.topology.chips:,}, {batch:,} a chip" if batch else "none tried fits"
