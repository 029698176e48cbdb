"""Trains a model: `python train.py --config=configs/digits.py [--workdir=DIR] [--config.KEY=VALUE ...]`."""

import functools
import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `program`: imports take seconds

from absl import app, flags

from cait_jax.cli.output import table
from cait_jax.cores import use_cores
from cait_jax.errors import UserError, config_flags, nearest, quiet_libraries, speaking
from cait_jax.processes import end_program, join_processes
from cait_jax.train import NonFiniteError, train
from cait_jax.train.config import (
    CommandLine,
    default_workdir,
    flatten,
    load_config,
    parse_command_line,
)
from cait_jax.train.keys import key_rows
from cait_jax.train.setup import mesh_fits

flags.DEFINE_string(
    "config",
    None,
    "A recipe, such as configs/digits.py or configs/cait_xs24.py:384; --config.KEY=VALUE sets a key.",
)
HELP_CONFIG = flags.DEFINE_bool(
    "help-config", False, "With --config: print its keys with value, range and meaning, and end."
)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; by default runs/ and the recipe's name and argument."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "One of several processes, as Slurm, Open MPI or a TPU pod started it."
)
COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "One of several processes: HOST:PORT of process 0, where nobody else knows.",
)
PROCESSES = flags.DEFINE_integer("processes", None, "With --coordinator: how many there are.")
PROCESS = flags.DEFINE_integer("process", None, "With --coordinator: which this is, from 0.")


def main(line: CommandLine) -> int:
    """Runs the training that a command line describes, and gives the exit status."""
    if line.file is None:
        raise UserError("give a recipe by --config=FILE, such as --config=configs/digits.py")
    config = load_config(line.file, line.overrides)
    if HELP_CONFIG.value:
        print(table(key_rows(flatten(config))))
        return 0
    if WORKDIR.value == "":
        raise UserError("--workdir is empty: give a directory, or leave it out")
    workdir = WORKDIR.value or default_workdir(line.file)
    address, count, index = COORDINATOR.value, PROCESSES.value, PROCESS.value
    if DISTRIBUTED.value or (address, count, index) != (None, None, None):
        join_processes(
            address=address, count=count, index=index, start_seconds=config.watchdog.start_seconds
        )
    else:
        use_cores(functools.partial(mesh_fits, config))
    return 0 if train(config, workdir).finished else 130


def parse(argv: list[str]) -> CommandLine:
    """Parses the flags, and takes the config's apart from them.

    Raises:
      UserError: a flag is unknown or its value of the wrong kind, or an argument is no flag.
    """
    argv = flags.FLAGS.read_flags_from_files(argv, force_gnu=False)
    line = parse_command_line(argv[1:])
    try:
        _, *others = flags.FLAGS([argv[0], *line.rest])
    except flags.UnrecognizedFlagError as error:
        known = flags.FLAGS.get_key_flags_for_module(__name__)
        near = nearest(error.flagname, [flag.name for flag in known])
        raise UserError(f"there is no flag --{error.flagname}; {near}") from error
    except (flags.Error, ValueError) as error:
        raise UserError(" ".join(str(error).split())) from error
    if others:
        raise UserError(
            f"{others[0]!r} is no flag: a key of the config is set by --config.KEY=VALUE"
        )
    return line


def program() -> int:
    """The whole program; gives the exit status."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    quiet_libraries()
    with speaking(config_flags):
        try:
            app.run(main, flags_parser=parse)
        except BaseException as error:
            if isinstance(error, SystemExit) and isinstance(error.code, int):  # how absl returns
                return error.code
            end_program("train.py", error, (UserError, NonFiniteError))
    return 0


if __name__ == "__main__":
    sys.exit(program())
