"""`cait finetune`: a model for the photographs in a folder."""

import contextlib
import shlex
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.common import COUNT, EPOCHS, SEED, Finite, image_size_option, weights_option
from cait_jax.cli.output import echo, note


@click.command(
    "finetune",
    short_help="Train a model on a folder of photographs, one folder a class.",
    epilog="Example: cait finetune photos/ --model cait_xxs24_224",
)
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--model", "-m", required=True, metavar="NAME|DIR",
    help="Where to start: a name of `cait models`, a saved model's directory, or a training run's.",
)  # fmt: skip
@weights_option
@click.option(
    "--workdir", type=click.Path(path_type=Path), metavar="DIR",
    help="The run's directory; runs/FOLDER-MODEL if not given.",
)  # fmt: skip
@click.option(
    "--what", type=click.Choice(["all", "head", "two-phase", "lora"]),
    help="What learns: everything, the new head alone (fitted on features that are computed once), first that "
    "head and then it and the last blocks, or the head and adapters of low rank (LoRA); by the number of images "
    "if not given.",
)  # fmt: skip
@click.option(
    "--rank",
    type=click.IntRange(1, 1024),
    help="Of the adapters, with --what lora; 8 if not given.",
)
@click.option(
    "--alpha", type=Finite(1e-3, 1e3),
    help="Scale of the adapters times their rank, with --what lora; 16 if not given.",
)  # fmt: skip
@click.option("--epochs", type=EPOCHS, help="Passes over the training images.")
@click.option("--batch-size", type=COUNT, help="Images a step.")
@image_size_option
@click.option("--seed", type=SEED, default=0, show_default=True, help="Of every random draw.")
@click.pass_context
def command(
    ctx: click.Context,
    directory: Path,
    model: str,
    weights: Path | None,
    workdir: Path | None,
    what: str | None,
    rank: int | None,
    alpha: float | None,
    epochs: float | None,
    batch_size: int | None,
    image_size: int | None,
    seed: int,
) -> None:
    """Train a model on the photographs in the folder DIR, which has one folder of images a class.

    DIR may hold folders train and val, each with the classes; if not, a tenth of the images is kept for
    measuring. Few images train the new head and the last blocks, more train everything.

    Ctrl-C saves and stops, with status 130; the same command goes on from there.
    """
    import jax
    from absl import logging

    from cait_jax.cores import use_cores
    from cait_jax.errors import UserError
    from cait_jax.files import run_folder, run_folder_name
    from cait_jax.train import NonFiniteError, train
    from cait_jax.train.finetune import folder_config, look_through

    logging.set_verbosity(logging.WARNING)  # Orbax logs much at INFO
    photographs = look_through(directory)
    most = photographs.images
    use_cores(lambda devices: devices <= most and (batch_size or devices) % devices == 0)
    run_name = run_folder_name(f"{photographs.directory.name}-{Path(model).name}")
    workdir = workdir or Path("runs") / run_name
    if what == "head":
        training = {"--epochs": epochs, "--rank": rank, "--alpha": alpha}
        for option, value in training.items():
            if value is not None:
                raise UserError(
                    f"{option} {value:g} goes with training, and --what head fits the head at once: leave it out"
                )
        _fit_head(photographs, model, weights, workdir, image_size, batch_size, seed)
        return
    config = folder_config(
        photographs,
        model,
        weights=weights,
        what=what,
        epochs=epochs,
        batch_size=batch_size,
        image_size=image_size,
        rank=rank,
        alpha=alpha,
        seed=seed,
        devices=jax.device_count(),
    )
    run_folder(workdir)
    echo(_plan(photographs, config, model))
    _check_files(photographs)
    try:
        run = train(config, workdir)
    except UserError:
        # An empty directory goes.
        with contextlib.suppress(OSError):
            workdir.rmdir()
        raise
    except NonFiniteError as error:
        raise click.ClickException(str(error)) from error
    if not run.finished:
        ctx.exit(130)
    echo(
        f"accuracy {run.metrics['eval/accuracy']:.1%} on the {photographs.eval_images:,} images of "
        f"{photographs.eval_split}; try it: cait predict IMAGE --model {shlex.quote(str(workdir))}"
    )


def _fit_head(
    photographs: Any,
    model: str,
    weights: Path | None,
    workdir: Path,
    image_size: int | None,
    batch_size: int | None,
    seed: int,
) -> None:
    """Saves the model with a head that is fitted on its features, in `workdir`."""
    from cait_jax.cli.common import load_model
    from cait_jax.errors import UserError
    from cait_jax.files import run_folder
    from cait_jax.models.cait import CaiT
    from cait_jax.train.head import fit_on_folder
    from cait_jax.weights.pretrained import save_pretrained
    from cait_jax.weights.runs import is_run

    run_folder(workdir)
    if is_run(workdir):
        raise UserError(f"{workdir} is a training run: give another --workdir, or remove it")
    loaded = load_model(
        model, weights=weights, image_size=image_size, num_classes=0, precision="highest"
    )
    if not isinstance(loaded.model, CaiT):
        raise UserError(f"{model} is no transformer: choose one, such as cait_xxs24_224")
    echo(
        f"{photographs.images:,} images of {len(photographs.class_names):,} classes to learn from, "
        f"{photographs.eval_images:,} to measure on\n"
        f"{model} gives each its features once, and a head is fitted on them"
    )
    fitted = fit_on_folder(
        photographs, loaded.model, loaded.variables, loaded.preprocessing, workdir,
        batch_size=batch_size or 32, seed=seed,
    )  # fmt: skip
    for path, reason in fitted.broken[:4]:
        note(f"{path} is left out: {reason}")
    if len(fitted.broken) > 4:
        note(f"so are {len(fitted.broken) - 4:,} others")
    save_pretrained(
        workdir, fitted.model, fitted.variables, label_names=photographs.class_names,
        preprocessing=loaded.preprocessing,
    )  # fmt: skip
    echo(
        f"accuracy {fitted.accuracy:.1%} on the {fitted.measured:,} images of "
        f"{photographs.eval_split}; try it: cait predict IMAGE --model {shlex.quote(str(workdir))}"
    )


def _check_files(photographs: Any) -> None:
    """Refuses any broken evaluation image, and more broken training images than training replaces."""
    from cait_jax.data.folder import load_folder
    from cait_jax.data.loader import MAX_BROKEN
    from cait_jax.data.show import check_images
    from cait_jax.evaluation.scores import show_progress

    for name, may_be_broken in (("train", MAX_BROKEN), (photographs.eval_split, 0.0)):
        split = load_folder(photographs.directory, name)
        with show_progress(len(split), f"checking {name}") as update:
            broken = check_images(split, may_be_broken=may_be_broken, progress=update)
        if broken:
            note(f"{broken} of {len(split):,} images of {name} are broken; others replace them")


def _plan(photographs: Any, config: Any, model: str) -> str:
    """The run in two lines."""
    if rank := config.lora.rank:
        part = f"adapters of rank {rank}"
    elif config.init.fit_head:
        part = f"the last {config.optimizer.train} blocks"
    else:
        part = "the head alone" if config.optimizer.train == "head" else "the whole network"
    if config.init.fit_head:
        part = f"a head that is fitted on features, then {part} too"
    learns = f"{part} ({config.epochs:g} epochs)"
    return (
        f"{photographs.images:,} images of {len(photographs.class_names):,} classes to learn from, "
        f"{photographs.eval_images:,} to measure on\n"
        f"{model} learns {learns}, {config.batch_size} images a step"
    )
