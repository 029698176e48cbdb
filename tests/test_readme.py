"""What README shows is what the commands print."""

from pathlib import Path

import click
from click.testing import CliRunner

from cait_jax.cli import COMMANDS, main

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_zoo_is_the_output_of_cait_models():
    shown = README.split("<!-- cait models --markdown -->\n")[1].split("\n<!-- end -->")[0]
    result = CliRunner().invoke(main, ["models", "--markdown"], prog_name="cait")
    assert result.exit_code == 0
    assert shown == result.stdout.rstrip("\n")


def test_every_command_and_option_in_readme_exists():
    lines = [line.split("  #")[0] for line in README.splitlines() if line.startswith("cait ")]
    assert len(lines) >= 8
    for line in lines:
        command, *arguments = line.split()[1:]
        assert command in COMMANDS, line
        known = {
            name
            for option in main.get_command(click.Context(main), command).params
            for name in (*option.opts, *option.secondary_opts)
        }
        for argument in arguments:
            assert not argument.startswith("-") or argument in known, line
