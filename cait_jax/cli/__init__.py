"""The program `cait`: one module a command, imported when it runs."""

import importlib
import re
from typing import Any

import click

from cait_jax.cli.common import running_command_options
from cait_jax.errors import UserError, printable, quiet_libraries, speaking
from cait_jax.processes import explain as explain_error  # `cait_jax.cli.explain` is a command
from cait_jax.processes import leave

# Each is a module of its name, which imports heavy libraries inside its command.
COMMANDS = (
    "models",
    "recipes",
    "predict",
    "evaluate",
    "features",
    "explain",
    "report",
    "plot",
    "finetune",
    "sweep",
    "convert",
    "export",
    "push",
    "data",
    "plan",
)


class Commands(click.Group):
    """Imports commands lazily; a `UserError` becomes one sentence and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order of first use."""
        del ctx
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, or None for click's own message."""
        del ctx
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"cait_jax.cli.{cmd_name}").command
        return command

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the program, escaping characters that the terminal lacks."""
        from cait_jax.cli.output import escape_in_streams

        escape_in_streams()
        return super().main(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        """Runs the command."""
        try:
            with speaking(running_command_options):
                try:
                    return super().invoke(ctx)
                except (
                    click.UsageError
                ) as error:  # it quotes what was typed, and lists choices a line each
                    sentence = re.sub(r"\s*\n\s*", " ", error.format_message())
                    raise click.UsageError(printable(sentence), error.ctx) from error
                except click.ClickException as error:
                    vars(error)["message"] = printable(error.message)
                    raise
                except Exception as error:
                    message = str(error) if isinstance(error, UserError) else explain_error(error)
                    if message is None:
                        raise
        except KeyboardInterrupt:
            ctx.exit(130)
        if self._is_program:
            leave(1, f"Error: {message}")
        raise click.ClickException(printable(message))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Runs as a process: the error message is the last line of standard error."""
        quiet_libraries()
        self._is_program = True
        try:
            return super().__call__(*args, **kwargs)
        except SystemExit as end:
            if isinstance(end.code, int) and end.code:
                leave(end.code)
            raise

    _is_program = False


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="cait-jax", prog_name="cait")
def main() -> None:
    """Image transformers for JAX: what a model sees, how good it is, its weights in and out.

    `cait finetune` trains on a folder of pictures; every other training is `python
    train.py --config=configs/NAME.py`, in the repository.
    """
