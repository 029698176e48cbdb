"""`cait data`: prepare, convert and show data sets."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import COUNT
from cait_jax.cli.output import as_json, check_writable, echo, note, table
from cait_jax.errors import printable, some

_FEW_CLASSES = 20


@click.group(
    "data",
    short_help="Data sets: prepare, convert from tfrecord, look at.",
    epilog="Example: cait data show photos/ --sheet sheet.png",
)
def command() -> None:
    """Get data sets in the form that training reads, and see what is in them."""


def _data_dir_option(function: Callable[..., Any]) -> Callable[..., Any]:
    return click.option(
        "--data-dir", metavar="DIR",
        help="Where TFDS data sets lie; $TFDS_DATA_DIR or ~/tensorflow_datasets if not given.",
    )(function)  # fmt: skip


@command.command("prepare", epilog="Example: cait data prepare cifar10 --data-dir DIR")
@click.argument("name")
@_data_dir_option
@click.option("--dry-run", is_flag=True, help="Only say what it takes.")
@click.option("--json", is_flag=True, help="Print JSON.")
def prepare_command(name: str, data_dir: str | None, dry_run: bool, json: bool) -> None:
    """Download the TFDS data set NAME and write it as array_record.

    This alone needs TensorFlow: pip install "cait-jax[prepare]". Some data sets, ImageNet among them, must be
    downloaded by hand; where their archives go is said first.
    """
    from cait_jax.data.prepare import plan_preparation, prepare

    plan = plan_preparation(name, data_dir)
    if not json:
        echo(_describe_plan(name, plan), err=True)
    if not dry_run:
        prepare(name, data_dir)
        if not json and not plan.prepared:
            echo(f"{name} is in {plan.folder}")
    if json:
        click.echo(
            as_json({key: str(value) if isinstance(value, Path) else value
                     for key, value in asdict(plan).items()} | {"prepared": not dry_run or plan.prepared})
        )  # fmt: skip


@command.command("convert", epilog="Example: cait data convert ~/tensorflow_datasets/cifar10/3.0.2")
@click.argument("directory", type=click.Path(path_type=Path), metavar="DIR")
@click.option("--json", is_flag=True, help="Print JSON.")
def convert_command(directory: Path, json: bool) -> None:
    """Add array_record files to the tfrecord data set in DIR, without TensorFlow.

    DIR is the folder of the data set's version, or one above it. Checksums of every record are checked. Files that
    exist already are kept, so a conversion that was stopped continues. The tfrecord files stay.
    """
    from tqdm import tqdm

    from cait_jax.data.prepare import convert, plan_conversion

    plan = plan_conversion(directory)
    with tqdm(
        total=plan.records, desc=printable(plan.folder.parent.name), unit="record", unit_scale=True,
        disable=None, leave=False,
    ) as bar:  # fmt: skip
        written = convert(plan, bar.update)
    result = {
        "folder": str(plan.folder),
        "records": plan.records,
        "files": len(plan.shards),
        "written": written,
    }
    if json:
        click.echo(as_json(result))
    elif written:
        echo(
            f"{plan.records:,} records of {plan.folder} can be read as array_record "
            f"({written} of {len(plan.shards)} files written)"
        )
    else:
        echo(f"{plan.folder} is array_record already: nothing to do")


@command.command("show", epilog="Example: cait data show cifar10 --split test --sheet sheet.png")
@click.argument("data", metavar="NAME|DIR")
@_data_dir_option
@click.option(
    "--split",
    help="Only this split, or a part such as 'train[:10%]'; all if not given, the first for --sheet.",
)
@click.option(
    "--sheet", type=click.Path(path_type=Path, dir_okay=False), metavar="PNG",
    help="Draw a contact sheet there.",
)  # fmt: skip
@click.option("--images", default=48, show_default=True, type=COUNT, help="On the contact sheet.")
@click.option("--json", is_flag=True, help="Print JSON.")
def show_command(
    data: str,
    data_dir: str | None,
    split: str | None,
    sheet: Path | None,
    images: int,
    json: bool,
) -> None:
    """Show what the data set NAME or the folder DIR holds: images, sizes and classes of each split.

    Sizes in pixels, and how many images are broken, are those of up to 100 images, evenly spread.
    """
    from tqdm import tqdm

    from cait_jax.data.show import open_split, summarize, write_sheet
    from cait_jax.data.sources import split_names
    from cait_jax.evaluation.labels import class_words

    check_writable(sheet, suffix=".png")
    names = split_names(data, data_dir=data_dir) if split is None else (split,)
    summaries, words, broken = [], [], []
    for name in tqdm(names, desc=printable(data), unit="split", disable=None, leave=False):
        opened = open_split(data, name, data_dir)
        summaries.append(summarize(data, name, opened, data_dir))
        if opened.left_out:
            note(opened.left_out)
        if summaries[-1].broken_images:
            note(f"broken in {name}: {some(summaries[-1].broken_images)}")
        if name == names[0]:
            words = list(class_words(opened.class_names))
            if sheet is not None:
                broken = write_sheet(sheet, opened, words, images=images)
    if json:
        result = {"data": data, "classes": words, "splits": [asdict(s) for s in summaries]}
        click.echo(as_json(result | ({} if sheet is None else {"sheet": str(sheet)})))
        return
    echo(table([_row(summary) for summary in summaries]))
    shown = ", ".join(printable(word.split(",")[0]) for word in words[:_FEW_CLASSES]) + (
        ", ..." if len(words) > _FEW_CLASSES else ""
    )
    echo(f"\n{len(words):,} classes: {shown}")
    if sheet is not None:
        broken_note = f"; {len(broken)} images on it are broken" if broken else ""
        echo(f"\n{sheet} shows images of {names[0]}{broken_note}")


def _row(summary: Any) -> dict[str, Any]:
    def pixels(sizes: tuple[int, int, int]) -> str:
        least, median, greatest = sizes
        return str(median) if least == greatest else f"{median} ({least} to {greatest})"

    return {
        "split": summary.name,
        "images": f"{summary.images:,}",
        "size": None if summary.bytes is None else _in_bytes(summary.bytes),
        "width": pixels(summary.width),
        "height": pixels(summary.height),
        "broken": f"{summary.broken} of {summary.decoded}",
    }


def _describe_plan(name: str, plan: Any) -> str:
    if plan.prepared:
        return f"{name} is in {plan.folder} as array_record: nothing to do"
    sizes = [
        f"{what} {_in_bytes(size)}"
        for what, size in (("to download", plan.download_bytes), ("on disk", plan.data_bytes))
        if size is not None
    ]
    known = ", ".join(sizes) or "TFDS does not say how large it is"
    by_hand = "" if plan.manual is None else f"; its archives are put by hand into {plan.manual}"
    return f"{name} goes to {plan.folder}: {known}, {_in_bytes(plan.free_bytes)} free{by_hand}"


def _in_bytes(size: int) -> str:
    amount = float(size)
    for unit in ("B", "kB", "MB", "GB"):
        if amount < 1000:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} TB"
