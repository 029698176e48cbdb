"""`cait push`: a model to the Hugging Face hub."""

import contextlib
import math
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_names_option, with_class_names
from cait_jax.cli.common import LoadedModel, load_model
from cait_jax.cli.output import as_json, echo, note, table
from cait_jax.errors import UserError

_PICTURE, _TRAINING = "class_attention.png", "training.json"


@click.command(
    "push",
    short_help="A trained model to the Hugging Face hub, with a model card.",
    epilog="Example: cait push runs/pets somebody/pets --image dog.jpg --license apache-2.0",
)
@click.argument("source", metavar="RUN", type=click.Path(path_type=Path, file_okay=False))
@click.argument("repository", metavar="NAMESPACE/NAME")
@click.option("--public", is_flag=True, help="Let everybody see it.  [default: private]")
@click.option("--yes", is_flag=True, help="Upload without asking.")
@click.option("--ema", is_flag=True, help="Of a training run, the averaged parameters.")
@click.option(
    "--license", metavar="ID", help="As the hub names it, such as apache-2.0; the card names none by default."
)  # fmt: skip
@click.option(
    "--dataset", "datasets", multiple=True, metavar="NAMESPACE/NAME",
    help="A data set on the hub that the model was trained on; may be repeated.",
)  # fmt: skip
@click.option(
    "--image", type=click.Path(path_type=Path, dir_okay=False), metavar="IMAGE",
    help="What the card's picture of class attention is drawn from.  [default: the first image of the run's "
    "evaluation split]",
)  # fmt: skip
@click.option("--no-image", is_flag=True, help="Upload no picture.")
@class_names_option
def command(
    source: Path,
    repository: str,
    public: bool,
    yes: bool,
    ema: bool,
    license: str | None,
    datasets: tuple[str, ...],
    image: Path | None,
    no_image: bool,
    class_names: Path | None,
) -> None:
    """Upload the model of RUN to the hub, in one commit: weights, configs and a model card.

    RUN is a training run (its newest checkpoint), RUN/checkpoints/STEP, or a saved model's directory. What would
    be uploaded is listed, and lies in a folder to be looked at, before you are asked. `hf://NAMESPACE/NAME` is
    then taken wherever a model is; timm loads it too where it has the network.

    The login is that of the hub's own tools: `hf auth login`, or HF_TOKEN. A push that was interrupted is
    completed by the same command.
    """
    from cait_jax.weights.card import CARD, Card, card_text, shareable
    from cait_jax.weights.push import find_target, upload
    from cait_jax.weights.runs import is_run, run_checkpoint
    from cait_jax.weights.saved import is_saved

    if image is not None and no_image:
        raise UserError("--image and --no-image exclude each other: give one")
    if not (is_run(source) or is_saved(source)):
        raise UserError(
            f"{source} is neither a training run nor a saved model: give its directory, which has checkpoints/ or "
            "a config.json"
        )
    if not yes and not _can_ask():
        raise UserError("there is no terminal to ask at: add --yes to upload without being asked")
    if image is not None:
        _check_image(image)
    target = find_target(repository, public=public)
    checkpoint = run_checkpoint(source) if is_run(source) else None
    place = source if checkpoint is None else checkpoint.path
    loaded = with_class_names(
        load_model(str(place), weights=None, image_size=None, ema=ema), class_names
    )
    with tempfile.TemporaryDirectory(prefix="cait-push-") as directory:
        folder = Path(directory)
        picture = None if no_image else _draw(folder / _PICTURE, loaded, image, checkpoint)
        card = Card(
            repository=repository,
            model=loaded.model,
            label_names=loaded.class_words if loaded.model.num_classes else (),
            preprocessing=loaded.preprocessing.to_dict(),
            license=license,
            datasets=datasets,
            for_timm=_write_model(folder, loaded),
            training=_training(checkpoint, ema=ema),
            picture=None if picture is None else (_PICTURE, picture),
            config=None if checkpoint is None else _TRAINING,
        )
        if checkpoint is not None:
            text = as_json(shareable(checkpoint.config))
            (folder / _TRAINING).write_text(f"{text}\n", encoding="utf-8")
        (folder / CARD).write_text(card_text(card), encoding="utf-8")
        names = sorted(path.name for path in folder.iterdir())
        _list(target, folder, names, license)
        if not (yes or click.confirm(f"They are in {folder} to look at. Upload them?")):
            note("nothing was uploaded")
            raise click.exceptions.Exit(1)
        message = f"Upload the model of step {checkpoint.step}" if checkpoint else "Upload a model"
        with _bars_that_end():
            commit = upload(target, folder, names, message=message)
    done = "had all of this already" if commit == target.commit else "is uploaded"
    echo(f"{repository} {done}: {target.address}, commit {commit}")
    echo(
        f'load it by cait_jax.load_pretrained("hf://{repository}@{commit}"), or without @ the newest'
    )


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _check_image(image: Path) -> None:
    from cait_jax.data.decode import read_size
    from cait_jax.data.split import BrokenImage
    from cait_jax.explain.figures import require_matplotlib
    from cait_jax.reading import MAX_IMAGE, read_bytes

    require_matplotlib()
    try:
        read_size(read_bytes(image, MAX_IMAGE))
    except (OSError, BrokenImage) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"--image {image} cannot be read: {reason}; give another image") from error


def _write_model(folder: Path, loaded: LoadedModel) -> bool:
    """Writes weights and config.json, and says whether timm has the network."""
    from cait_jax.weights.saved import save_pretrained
    from cait_jax.weights.timm_export import export_timm, timm_constructor

    options: dict[str, Any] = {
        "label_names": loaded.label_names if loaded.model.num_classes else None,
        "preprocessing": loaded.preprocessing,
    }
    try:
        timm_constructor(loaded.model)
    except UserError:
        save_pretrained(folder, loaded.model, loaded.variables, **options)
        return False
    export_timm(folder, loaded.model, loaded.variables, **options)
    return True


def _draw(path: Path, loaded: LoadedModel, image: Path | None, checkpoint: Any) -> str | None:
    """Draws class attention, and says of what; None with a note where there is nothing to draw."""
    import jax
    import numpy as np

    from cait_jax.explain.attention import check_class_token
    from cait_jax.explain.figures import attention_maps, require_matplotlib, save
    from cait_jax.explain.overview import overview

    without = "its card goes without a picture" if image is None else "leave out --image"
    try:
        require_matplotlib()
        check_class_token(loaded.model, way=without)
        if image is not None:
            crop, source = loaded.preprocessing.crop(image), "a photograph"
        elif checkpoint is not None:
            crop = _first_image(loaded, checkpoint.config)
            source = "the first image of the evaluation split"
        else:
            raise UserError("a saved model has no images of its own; give one by --image")
    except UserError as error:
        if image is not None:
            raise
        note(f"there will be no picture: {error}")
        return None
    function = jax.jit(overview(loaded.model, ["attention"]))
    seen = function(loaded.variables, loaded.preprocessing(crop[None]))
    maps = np.asarray(seen["class_token"])[0]
    first, kind = 0, "class block" if loaded.model.class_depth else "block"
    if not loaded.model.class_depth:  # a row for each block would be a column of pictures
        first, maps = len(maps) - 1, maps[-1:]
    names = [f"{kind} {first + number}" for number in range(len(maps))]
    save(attention_maps(crop, maps, layer_names=names), path)
    return source


def _first_image(loaded: LoadedModel, config: Any) -> Any:
    """The crop of the first image of the run's evaluation split."""
    import io

    from PIL import Image

    from cait_jax.data.sources import load_split
    from cait_jax.data.split import InMemory, read_record

    data = config["data"]
    split = load_split(
        data["name"],
        data["eval_split"],
        image_size=loaded.model.image_size,
        data_dir=data["data_dir"],
    )
    if isinstance(split, InMemory):
        return split.images[0]
    with Image.open(io.BytesIO(read_record(split, 0)["image"])) as picture:
        return loaded.preprocessing.crop(picture)


def _training(checkpoint: Any, *, ema: bool) -> Any:
    """What the card says of the run, with the metrics of the parameters that are uploaded."""
    from cait_jax.weights.card import Training

    if checkpoint is None:
        return None
    found = {key.removeprefix("eval/"): value for key, value in checkpoint.metrics.items()}
    data = checkpoint.config["data"]
    return Training(
        checkpoint.step,
        data["name"],
        data["eval_split"],
        {k: v for k, v in found.items() if k.startswith("ema_") == ema and math.isfinite(v)},
    )


def _list(target: Any, folder: Path, names: list[str], license: str | None) -> None:
    visible = "private" if target.private else "PUBLIC"
    there = () if target.files is None else target.files
    state = "a new repository" if target.files is None else "which is there already"
    rows = [
        {
            "file": name,
            "bytes": f"{(folder / name).stat().st_size:,}",
            "on the hub": "replaced" if name in there else "new",
        }
        for name in names
    ]
    echo(f"to {target.address}, {visible}, {state}:\n\n{table(rows)}\n")
    if kept := [name for name in there if name not in names]:
        echo(f"these stay there: {', '.join(kept)}")
    if license is None:
        note("the card names no license: --license ID names one")


@contextlib.contextmanager
def _bars_that_end() -> Iterator[None]:
    """Shows the library's progress bars on a terminal alone, where the line of one that stopped is ended."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils
    shown = sys.stderr.isatty()
    silenced = not shown and not utils.are_progress_bars_disabled()
    if silenced:
        utils.disable_progress_bars()
    try:
        yield
    except BaseException:
        if shown:
            click.echo(err=True)
        raise
    finally:
        if silenced:
            utils.enable_progress_bars()
