"""`cait recipes` prints the table of docs/results.md, and every figure has one source."""

import json
from pathlib import Path

from click.testing import CliRunner

from cait_jax.cli import main
from cait_jax.cli.recipes import recipes
from cait_jax.train.keys import KEYS
from cait_jax.train.resume import FREE_KEYS
from cait_jax.weights.hub import published_result

ROOT = Path(__file__).parents[2]


def printed(*arguments):
    result = CliRunner().invoke(main, ["recipes", *arguments], prog_name="cait")
    assert result.exit_code == 0
    return result.stdout.rstrip("\n")


def test_the_table_in_the_documentation_is_what_the_command_prints():
    text = (ROOT / "docs" / "results.md").read_text()
    shown = text.split("<!-- cait recipes --markdown -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == printed("--markdown")


def test_a_pattern_chooses_and_json_has_exact_numbers():
    rows = json.loads(printed("cait_s24*", "--json"))
    assert [row["recipe"] for row in rows] == [
        "cait_s24.py", "cait_s24.py:384", "cait_s24.py:distilled", "cait_s24.py:384,distilled",
    ]  # fmt: skip
    assert [row["top1"] for row in rows] == [82.7, 84.3, 83.484, 85.048]
    assert rows[3]["source"] == "timm's measurement of the released cait_s24_384"
    assert "99.44 %" in printed("digits*")


def test_expectations_of_models_are_those_of_cait_models():
    table = {row.recipe: row.top1 for row in recipes()}
    assert table["cait_xs24.py"] == published_result("cait_xs24").top1
    assert table["cait_m48.py:448,distilled"] == published_result("cait_m48_448").top1
    assert table["deit.py:base,distilled"] == published_result("deit_base_distilled").top1
    assert table["cait_m48.py"] is None


def test_the_digits_have_one_figure_everywhere():
    (row,) = (row for row in recipes() if row.recipe == "digits.py")
    assert row.run_here.startswith("99.44 %, mean of seeds 0, 1, 2")
    texts = [path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/**/*.md"))]
    assert not any(
        slip in text for text in texts for slip in ("0.9935", "0.9954", "99.35 %", "99.54 %")
    )


def test_the_keys_in_the_documentation_are_those_of_the_table():
    text = (ROOT / "docs" / "training.md").read_text()
    shown = text.split("<!-- cait recipes --keys --markdown -->\n")[1].split("\n<!-- end -->")[0]
    assert shown == printed("--keys", "--markdown")
    rows = json.loads(printed("--keys", "--json", "eval.*"))
    assert [row["key"] for row in rows] == ["eval.batch_size", "eval.every_epochs", "eval.crop_pct"]
    assert rows[2]["allowed"] == "a finite number in [0.001, 1]"


def test_the_keys_that_may_change_on_resume_are_documented():
    text = " ".join((ROOT / "docs" / "training.md").read_text().split())
    names = [f"`{key}`" if key in KEYS else f"`{key}.*`" for key in FREE_KEYS]
    (sentence,) = (part for part in text.split(". ") if part.endswith("may change"))
    assert sorted(name for name in sentence.replace(",", "").split() if "`" in name) == sorted(
        names
    )
