"""Every option that takes a number has a range, and no number in it is NaN or infinite."""

import click
import pytest
from click.testing import CliRunner

from cait_jax.cli import COMMANDS, main
from cait_jax.cli.numbers import Finite


def options(command):
    """Every option of a command and of those below it."""
    if isinstance(command, click.Group):
        for name in command.list_commands(click.Context(command)):
            yield from options(command.get_command(click.Context(command), name))
    for param in command.params:
        yield command.name, param


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_range(name):
    command = main.get_command(click.Context(main), name)
    for owner, param in options(command):
        kind = param.type
        if isinstance(kind, click.types.IntParamType | click.types.FloatParamType):
            assert isinstance(kind, click.IntRange | Finite), (owner, param.name)
            assert kind.min is not None, (owner, param.name)
            assert kind.max is not None, (owner, param.name)


@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x"])
def test_only_finite_numbers_pass(text):
    with pytest.raises(click.BadParameter):
        Finite().convert(text, None, None)
    assert Finite().convert("1e3", None, None) == 1000.0


@pytest.mark.parametrize(
    "arguments",
    [
        "finetune x -m y --epochs nan",
        "finetune x -m y --epochs inf",
        "finetune x -m y --seed -1",
        "predict x -m y --image-size 0",
        "predict x -m y --image-size -5",
        "predict x -m y --batch-size 1e3",
        "evaluate --data x -m y --workers -1",
    ],
)
def test_a_number_out_of_range_names_the_option(arguments):
    result = CliRunner().invoke(main, arguments.split(), prog_name="cait")
    assert result.exit_code == 2
    option = arguments.split()[-2]
    assert f"Error: Invalid value for '{option}'" in result.stderr.splitlines()[-1]
