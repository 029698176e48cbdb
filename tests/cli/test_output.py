"""What commands print is data to programs and harmless to terminals."""

import csv
import io
import json
import os
import subprocess
import sys

import pytest
from test_commands import cait

from cait_jax import UserError
from cait_jax.cli.output import as_json, json_line, table, text_output

ODD = (
    "caf\u00e9", "esc\x1b[31m", "line\nfeed", 'comma, quote"', os.fsdecode(b"na\xefve"), "\u202eright",
)  # fmt: skip


def test_json_holds_no_number_that_is_none():
    record = {"a": float("nan"), "b": [1.5, float("inf"), (float("-inf"), None)], "c": {"d": 0.0}}
    expected = {"a": None, "b": [1.5, None, [None, None]], "c": {"d": 0.0}}
    assert json.loads(json_line(record)) == json.loads(as_json(record)) == expected
    assert json.loads(as_json([record, "x"])) == [expected, "x"]
    assert json_line("\x7f\x1b\u202e\udce9") == r'"\u007f\u001b\u202e\udce9"'


def test_cells_of_tables_are_printable():
    assert "a\\x1b\\x0ab" in table([{"class": "a\x1b\nb", "images": 3}])


@pytest.fixture
def odd(photographs, tmp_path):
    """A folder with one picture under every odd name."""
    data = (photographs / "sparrow" / "1.png").read_bytes()
    for name in ODD:
        (tmp_path / f"{name}.png").write_bytes(data)
    return tmp_path


@pytest.mark.parametrize("style", [[], ["--json"], ["--csv"]])
def test_odd_names_are_printed_in_every_style(odd, saved, style):
    out, err = cait("predict", odd, "-m", saved, "--top", 1, *style)
    assert err == ""
    names = {str(odd / f"{name}.png") for name in ODD}
    if style == ["--json"]:
        assert out.isascii()
        assert {json.loads(line)["image"] for line in out.splitlines()} == names
        return
    for harmful in "\x1b\u202e\udcef":
        assert harmful not in out
    assert "na\\xefve" in out
    assert "esc\\x1b[31m" in out
    if style == ["--csv"]:
        rows = list(csv.DictReader(io.StringIO(out)))
        assert len(rows) == len(ODD)
        assert str(odd / "line\nfeed.png") in {row["image"] for row in rows}
    else:
        assert "line\\x0afeed" in out


def test_a_csv_file_holds_names_as_they_are(odd, saved, tmp_path_factory):
    target = tmp_path_factory.mktemp("out") / "o.csv"
    assert cait("predict", odd, "-m", saved, "--top", 1, "--csv", "-o", target)[0] == ""
    with target.open(encoding="utf-8", newline="") as file:
        found = {row["image"] for row in csv.DictReader(file)}
    expected = {str(odd / f"{name}.png").replace("\udcef", r"\xef") for name in ODD}
    assert found == expected


def test_a_file_that_cannot_be_written_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="make it"), text_output(tmp_path / "no" / "x"):
        pass
    with pytest.raises(UserError, match="cannot be written: Is a directory"), text_output(tmp_path):
        pass


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_another_encoding_escapes_what_it_does_not_have(tmp_path, encoding):
    names = ("caf\u00e9 \u4e2d", "dog")
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "0.png").write_bytes(b"no image")
    result = subprocess.run(
        [sys.executable, "-m", "cait_jax", "data", "show", str(tmp_path)],
        env=os.environ | {"PYTHONIOENCODING": encoding},
        capture_output=True,
        check=True,
    )
    broken = f"cait: broken in all: image 0 ({names[0]}/0.png), image 1 (dog/0.png)\n"
    assert result.stderr == broken.encode(encoding, "backslashreplace")
    shown = f"2 classes: {', '.join(names)}"
    assert shown.encode(encoding, "backslashreplace") in result.stdout
