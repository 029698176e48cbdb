"""Output of commands: text and tables, JSON, CSV.

On a terminal names of files and classes are `printable`. JSON is ASCII and lossless (bytes that are not UTF-8 are
surrogates, as `os.fsencode` takes them); CSV in a file has such bytes escaped.
"""

import contextlib
import csv
import errno
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from tabulate import tabulate

from cait_jax.errors import UserError, printable, writable
from cait_jax.files import to_json
from cait_jax.reading import check_regular


def escape_in_streams() -> None:
    """Lets standard output and error escape characters that their encoding lacks, as in a C locale."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def echo(text: str, *, err: bool = False) -> None:
    """Prints text, `printable`."""
    # click.echo alone writes UTF-8 to a stream whose encoding is ASCII.
    click.echo(printable(text, keep="\n"), file=sys.stderr if err else sys.stdout)


def note(sentence: str) -> None:
    """Prints a warning on standard error."""
    echo(f"cait: {printable(sentence)}", err=True)


@contextlib.contextmanager
def text_output(path: Path | None) -> Iterator[Callable[[str], None]]:
    """Yields a function that writes text, unbuffered, to a UTF-8 file; to standard output for None and `-`.

    Raises:
      UserError: the file cannot be written.
    """
    if path is None or str(path) == "-":

        def printed(text: str) -> None:
            click.echo(printable(text, keep="\n"), file=sys.stdout, nl=False)

        yield printed
        return
    if not path.is_char_device():  # such as /dev/null
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
    """Rows of the same keys as an aligned table, with empty cells for None."""
    heads = list(rows[0]) if rows else []
    cells = [
        ["" if row[head] is None else printable(str(row[head])) for head in heads] for row in rows
    ]
    style = "github" if markdown else "simple"
    # Numbers are formatted already.
    right = ["right" if _is_number(column) else "left" for column in zip(*cells, strict=True)]
    return str(
        tabulate(cells, heads, tablefmt=style, disable_numparse=True, colalign=right or None)
    )


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """An object or a list as JSON with each member on one line, as `json_line` writes it."""
    if isinstance(value, Mapping):
        members = [f"{json_line(key)}: {json_line(member)}" for key, member in value.items()]
    else:
        members = [json_line(member) for member in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return "\n".join([opening, ",\n".join(f"  {member}" for member in members), closing])


def json_line(value: Any) -> str:
    """One line of ASCII JSON (RFC 8259); NaN and infinity become null, DEL is escaped."""
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


def check_writable(*paths: Path | None, suffix: str = "") -> None:
    """Tries output files before the work: each must be a regular file or none yet, in a directory that takes it.

    Raises:
      UserError: naming the path and the cause, or the `suffix` that a name must have.
    """
    for path in paths:
        if path is None:
            continue
        if path.suffix.lower() != suffix and suffix:
            raise UserError(f"{path} does not end in {suffix}, which is what is written: add it")
        if not path.absolute().parent.is_dir():
            raise UserError(f"there is no directory {path.parent} to write {path.name} in: make it")
        try:
            with contextlib.suppress(FileNotFoundError):
                check_regular(path)
            if path.exists() and not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, "it is not writable")
            _try(path.with_name(f".{path.name}.tmp"))
        except OSError as error:
            raise UserError(
                f"{path} cannot be written: {error.strerror}; choose another file"
            ) from error


def _try(path: Path) -> None:
    """Makes a file and removes it."""
    if not path.exists():
        path.touch()
        path.unlink()
