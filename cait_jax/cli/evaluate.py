"""`cait evaluate`: how good a model is on a data set."""

from pathlib import Path
from typing import Any

import click

from cait_jax.cli.loading import Loaded, dtype_option, model_options
from cait_jax.cli.numbers import COUNT, WORKERS
from cait_jax.cli.output import as_json, check_writable, table

_FEW_CLASSES = 20
_WORST = 5


@click.command(
    "evaluate",
    short_help="How good a model is on a data set, exactly.",
    epilog="Example: cait evaluate --model cait_xs24_384 --data imagenet_v2 --data-dir DIR",
)
@model_options
@dtype_option
@click.option(
    "--data", required=True, metavar="NAME|DIR",
    help="imagenet, imagenet_v2, imagenet_real, imagenet_a, imagenet_r, imagenet_sketch, any TFDS name "
    "prepared as array_record, digits, or a folder with a folder for each class.",
)  # fmt: skip
@click.option(
    "--split", help="A split, or part of one such as 'test[:10%]'; the usual one if not given."
)
@click.option("--data-dir", metavar="DIR", help="Where TFDS data sets lie.")
@click.option("--batch-size", default=64, show_default=True, type=COUNT)
@click.option(
    "--workers",
    default=0,
    show_default=True,
    type=WORKERS,
    help="Processes that decode; 0: threads.",
)
@click.option("--knn", is_flag=True, help="k-NN accuracy of the features too.")
@click.option("--probe", is_flag=True, help="Linear-probe accuracy of the features too.")
@click.option(
    "--train-split", default="train", show_default=True, help="What --knn and --probe learn from."
)
@click.option(
    "--confusion", type=click.Path(path_type=Path, dir_okay=False), metavar="PNG",
    help="Draw the confusion matrix there.",
)  # fmt: skip
@click.option(
    "--logits", type=click.Path(path_type=Path, dir_okay=False), metavar="NPZ",
    help="Write the logits of every image there, in order, as `distill.logits` of a config reads them.",
)  # fmt: skip
@click.option("--json", is_flag=True, help="Print JSON.")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE",
    help="Write the JSON there as well.",
)  # fmt: skip
def command(
    load: Any,
    numerics: dict[str, Any],
    model_name: str,
    data: str,
    split: str | None,
    data_dir: str | None,
    batch_size: int,
    workers: int,
    knn: bool,
    probe: bool,
    train_split: str,
    confusion: Path | None,
    logits: Path | None,
    json: bool,
    output: Path | None,
) -> None:
    """Score a model on every image of a data set, over all devices.

    Images are resized and cropped as the model's own settings say. Where a data set has fewer classes than the
    model, as ImageNet-A and -R and many folders do, only those compete; on ImageNet-ReaL any of an
    image's labels is right, and images without labels do not count.
    """
    import numpy as np

    from cait_jax.data.sources import load_split
    from cait_jax.evaluation.benchmarks import find_benchmark
    from cait_jax.evaluation.score import score, with_channels

    check_writable(confusion, logits, output)
    found = find_benchmark(data, split, data_dir=data_dir)
    if confusion is not None and found.rule == "real":
        raise click.UsageError(
            "--confusion needs one label an image, and ImageNet-ReaL has several"
        )
    loaded = load(**numerics)
    prepare = loaded.preprocessing

    def open_split(name: str) -> Any:
        opened = load_split(found.data, name, image_size=prepare.image_size, data_dir=data_dir)
        return with_channels(opened, prepare.channels)

    examples = open_split(found.split)
    # A split that does not exist is told before the work begins.
    train = open_split(train_split) if knn or probe else None
    scores = score(
        loaded.model,
        loaded.variables,
        examples,
        prepare,
        batch_size=batch_size,
        rule=found.rule,
        class_names=loaded.label_names,
        workers=workers,
        progress=f"{found.data} {found.split}",
    )
    result: dict[str, Any] = {
        "model": model_name,
        "data": found.data,
        "split": found.split,
        "preprocessing": prepare.to_dict(),
        **scores.as_dict(),
    }
    reading = {"batch_size": batch_size, "workers": workers}
    if train is not None:
        result |= _features_accuracy(loaded, train, examples, knn=knn, probe=probe, **reading)
    if logits is not None:
        rows, _ = _outputs(loaded, examples, "logits", features_of=_logits_of, **reading)
        with logits.open("wb") as file:  # NumPy would add a suffix to a name without one
            np.savez(file, logits=rows)
    if confusion is not None:
        from cait_jax.data.imagenet import class_words
        from cait_jax.evaluation.confusion import save_confusion

        title = f"{model_name} on {found.data} {found.split}"
        matrix = np.asarray(scores.confusion)
        save_confusion(matrix, class_words(scores.class_names), confusion, title)
    if output is not None:
        output.write_text(as_json(result) + "\n")
    if json:
        click.echo(as_json(result))
    else:
        click.echo(_report(result))


def _features_accuracy(
    loaded: Loaded,
    train: Any,
    test: Any,
    *,
    knn: bool,
    probe: bool,
    batch_size: int,
    workers: int,
) -> dict[str, float]:
    """What the features alone tell about the classes."""
    from cait_jax.evaluation.features import head_features
    from cait_jax.evaluation.knn import knn_accuracy
    from cait_jax.evaluation.probe import probe_accuracy

    reading: dict[str, Any] = {
        "features_of": head_features,
        "batch_size": batch_size,
        "workers": workers,
    }
    features = [
        *_outputs(loaded, train, "features to learn from", **reading),
        *_outputs(loaded, test, "features to classify", **reading),
    ]
    result = {}
    if knn:
        result["knn"] = knn_accuracy(*features)
    if probe:
        result["probe"] = probe_accuracy(*features)
    return result


def _logits_of(model: Any, variables: Any, images: Any) -> Any:
    return model.apply(variables, images)


def _outputs(
    loaded: Loaded, split: Any, title: str, *, features_of: Any, batch_size: int, workers: int
) -> tuple[Any, Any]:
    """One row of numbers for each image of a split, and the labels."""
    from cait_jax.data.pipeline import eval_batches
    from cait_jax.evaluation.features import extract_features
    from cait_jax.evaluation.progress import show_progress
    from cait_jax.sharding import make_mesh, shared_size

    prepare = loaded.preprocessing
    with (
        eval_batches(
            split,
            batch_size=shared_size(batch_size, make_mesh()),
            image_size=prepare.image_size,
            workers=workers,
            crop_ratio=prepare.crop_ratio,
        ) as batches,
        show_progress(len(split), title) as update,
    ):
        return extract_features(
            loaded.model,
            loaded.variables,
            batches,
            mean=prepare.mean,
            std=prepare.std,
            features_of=features_of,
            progress=update,
        )


def _report(result: dict[str, Any]) -> str:
    """The scores for people."""

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.3%}"

    rows = [
        {"score": "top-1", "value": percent(result["top1"])},
        {"score": "top-5", "value": percent(result["top5"])},
        {"score": "loss (nats)", "value": result["loss"] and f"{result['loss']:.5f}"},
        {"score": "calibration error", "value": percent(result["ece"])},
    ]
    rows += [
        {"score": name, "value": percent(result[key])}
        for key, name in (("knn", "k-NN (k=20)"), ("probe", "linear probe"))
        if key in result
    ]
    lines = [
        f"{result['model']} on {result['counted']:,} images of {result['data']} {result['split']}",
        "",
        table([row for row in rows if row["value"] is not None]),
    ]
    per_class: list[tuple[float, str, int]] = []
    if result["class_accuracy"] is not None:
        columns = (result["class_accuracy"], result["class_names"], result["class_images"])
        per_class = [row for row in zip(*columns, strict=True) if row[2]]
    if per_class:
        from cait_jax.data.imagenet import class_words

        title = "by class"
        if len(per_class) > _FEW_CLASSES:
            per_class, title = sorted(per_class)[:_WORST], f"the {_WORST} worst classes"
        words = class_words([name for _, name, _ in per_class])
        rows = [
            {"class": word, "images": f"{images:,}", "accuracy": percent(accuracy)}
            for word, (accuracy, _, images) in zip(words, per_class, strict=True)
        ]
        lines += ["", f"{title}:", "", table(rows)]
    return "\n".join(lines)
