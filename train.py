"""Trains a model: `python train.py --config=configs/digits.py [--workdir=DIR] [--config.KEY=VALUE ...]`."""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from cait_jax.errors import UserError
from cait_jax.train import NonFiniteError, train
from cait_jax.train.config import check_command_line
from cait_jax.train.processes import ends_for_all, join_processes

CONFIG = config_flags.DEFINE_config_file("config", None, "A recipe, such as configs/digits.py.")
WORKDIR = flags.DEFINE_string(
    "workdir", None, "The run's directory; runs/<config's name> by default."
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
flags.mark_flag_as_required("config")


def main(argv: list[str]) -> int | None:
    """Runs the training that the flags describe, and gives the exit status."""
    del argv
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # Orbax says a lot at INFO
    path = config_flags.get_config_filename(flags.FLAGS["config"])
    workdir = WORKDIR.value or Path("runs") / Path(path).stem
    address, count, index = COORDINATOR.value, PROCESSES.value, PROCESS.value
    several = DISTRIBUTED.value or (address, count, index) != (None, None, None)
    with ends_for_all():
        try:
            if several:
                join_processes(address=address, count=count, index=index)
            run = train(CONFIG.value, workdir)
        except (UserError, NonFiniteError) as error:
            sys.exit(f"train.py: {error}")
    return 0 if run.finished else 130


def parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does, after a check that names what is near a wrong config or key."""
    try:
        check_command_line(argv)
    except UserError as error:
        sys.exit(f"train.py: {error}")
    return app.parse_flags_with_usage(argv)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)
