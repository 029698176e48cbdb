"""How commands print: tables for people, JSON and CSV for programs.

Names of files and classes reach a terminal `printable`. JSON is ASCII and holds them exactly (a byte that is not
UTF-8 as Python's surrogate, which `os.fsencode` turns back); CSV in a file holds them too, such bytes escaped.
"""

import contextlib
import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from cait_jax.errors import UserError, printable, writable
from cait_jax.files import to_json


def escape_in_streams() -> None:
    """Lets standard output and error escape what their encoding does not have, as in a C locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def say(text: str, *, err: bool = False) -> None:
    """Prints lines for people."""
    # Click would take a stream for UTF-8 that says it is ASCII.
    click.echo(printable(text, keep="\n"), file=sys.stderr if err else sys.stdout)


def note(sentence: str) -> None:
    """Prints a sentence on standard error that is no error."""
    say(f"cait: {printable(sentence)}", err=True)


@contextlib.contextmanager
def text_output(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Where a command writes its lines.

    Args:
      path: a file, written as UTF-8; None or `-` for standard output.

    Yields:
      A function that writes text through to there.

    Raises:
      UserError: the file cannot be written.
    """
    if path is None or str(path) == "-":

        def printed(text: str) -> None:
            click.echo(printable(text, keep="\n"), file=sys.stdout, nl=False)

        yield printed
        return
    check_writable(path)
    try:
        file = path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written: {error.strerror}; choose another file"
        ) from error
    with file:

        def written(text: str) -> None:
            file.write(writable(text))
            file.flush()

        yield written


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Rows as an aligned table.

    Args:
      rows: with the same keys, which become the heads.
      markdown: in Markdown's notation.

    Returns:
      The table; empty cells for None.
    """
    heads = list(rows[0]) if rows else []
    cells = [
        ["" if row[head] is None else printable(str(row[head])) for head in heads] for row in rows
    ]
    style = "github" if markdown else "simple"
    # Numbers come written as they should stand: tabulate is not to rewrite them.
    right = ["right" if _is_number(column) else "left" for column in zip(*cells, strict=True)]
    return tabulate(cells, heads, tablefmt=style, disable_numparse=True, colalign=right or None)


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """An object or a list as JSON, each member on a line of its own whatever it holds, as in `json_line`."""
    if isinstance(value, Mapping):
        members = [f"{json_line(key)}: {json_line(member)}" for key, member in value.items()]
    else:
        members = [json_line(member) for member in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return "\n".join([opening, ",\n".join(f"  {member}" for member in members), closing])


def json_line(value: Any) -> str:
    """A value as one line of ASCII JSON (RFC 8259): floats that are not finite become null, DEL is escaped."""
    return to_json(value).replace("\x7f", "\\u007f")


def csv_lines(rows: Iterable[Sequence[Any]]) -> str:
    """Rows as CSV (RFC 4180 quoting, line feeds)."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def _is_number(cells: Iterable[Any]) -> bool:
    return all(
        str(cell)
        .replace(",", "")
        .replace(".", "")
        .replace("-", "")
        .replace("%", "")
        .strip()
        .isdigit()
        for cell in cells
        if cell != ""
    )


def check_writable(*paths: Path | None) -> None:
    """Refuses files to write, None aside, in directories that do not exist.

    Raises:
      UserError: naming the directory.
    """
    for path in paths:
        if path is not None and not path.absolute().parent.is_dir():
            raise UserError(f"there is no directory {path.parent} to write {path.name} in: make it")
