"""How commands print: tables for people, JSON and CSV for programs, one broken pipe for none."""

import csv
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from cait_jax.errors import UserError


def table(rows: Sequence[Mapping[str, Any]], *, markdown: bool = False) -> str:
    """Rows as an aligned table.

    Args:
      rows: with the same keys, which become the heads.
      markdown: in Markdown's notation.

    Returns:
      The table; empty cells for None.
    """
    heads = list(rows[0]) if rows else []
    cells = [["" if row[head] is None else row[head] for head in heads] for row in rows]
    style = "github" if markdown else "simple"
    # Numbers come written as they should stand: tabulate is not to rewrite them.
    right = ["right" if _is_number(column) else "left" for column in zip(*cells, strict=True)]
    return tabulate(cells, heads, tablefmt=style, disable_numparse=True, colalign=right or None)


def as_json(value: Mapping[str, Any] | Sequence[Any]) -> str:
    """An object or a list as JSON, each member on a line of its own whatever it holds."""
    if isinstance(value, Mapping):
        members = [f"{json.dumps(key)}: {json.dumps(member)}" for key, member in value.items()]
    else:
        members = [json.dumps(member) for member in value]
    opening, closing = "{}" if isinstance(value, Mapping) else "[]"
    return "\n".join([opening, ",\n".join(f"  {member}" for member in members), closing])


def json_line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON."""
    return json.dumps(record)


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
