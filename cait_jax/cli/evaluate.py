"""`cait evaluate`: how good a model is on a data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from cait_jax.cli.classes import class_names_option, with_class_names
from cait_jax.cli.common import COUNT, WORKERS, LoadedModel, dtype_option, model_options
from cait_jax.cli.output import as_json, check_writable, echo, note, table
from cait_jax.errors import UserError, printable

_FEW_CLASSES = 20
_WORST = 5
_NEIGHBOURS = 20


@click.command(
    "evaluate",
    short_help="How good a model is on a data set, exactly.",
    epilog="Example: cait evaluate --model cait_xs24_384 --data imagenet_v2 --data-dir DIR",
)
@model_options
@dtype_option
@class_names_option
@click.option(
    "--data", required=True, metavar="NAME|DIR",
    help="imagenet, imagenet_v2, imagenet_real, imagenet_a, imagenet_r, imagenet_sketch, any TFDS name "
    "prepared as array_record, digits, or a folder with a folder for each class.",
)  # fmt: skip
@click.option(
    "--split", help="A split, or part of one such as 'test[:10%]'; the usual one if not given."
)
@click.option("--data-dir", metavar="DIR", help="Where TFDS data sets lie.")
@click.option(
    "--rule", type=click.Choice(["all", "restricted"]),
    help="Which classes compete: all of the model's, or those that occur; by the data set if not given.",
)  # fmt: skip
@click.option(
    "--by-position", is_flag=True,
    help="Take the data set's first class for the model's first, and so on, whatever their names are.",
)  # fmt: skip
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
    "--confusion", type=click.Path(path_type=Path, dir_okay=False), metavar="PICTURE",
    help="Draw the confusion matrix there, a .png, .svg or .pdf.",
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
    dtype_policy: dict[str, Any],
    model_name: str,
    data: str,
    split: str | None,
    data_dir: str | None,
    class_names: Path | None,
    rule: str | None,
    by_position: bool,
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

    Images are resized and cropped as the model's own settings say. Classes are matched by name. Where a data set
    has fewer classes than the model, as ImageNet-A and -R and many folders do, only those compete; on
    ImageNet-ReaL any of an image's labels is right, and images without labels do not count. Of a model without
    a head --knn and --probe alone are measured.
    """
    from cait_jax.cores import use_cores
    from cait_jax.data.sources import load_split
    from cait_jax.evaluation.scores import find_benchmark, with_channels
    from cait_jax.explain.figures import require_matplotlib

    check_writable(confusion, logits, output)
    if confusion is not None:
        require_matplotlib(confusion)
    found = find_benchmark(data, split, data_dir=data_dir)
    if confusion is not None and found.rule == "real":
        raise click.UsageError(
            "--confusion needs one label an image, and ImageNet-ReaL has several"
        )
    use_cores()
    loaded = _load(load, dtype_policy, headless=knn or probe)
    head = loaded.model.num_classes > 0
    if not head:
        _refuse_without_head(
            knn or probe,
            **{"--confusion": confusion, "--logits": logits, "--class-names": class_names,
               "--rule": rule, "--by-position": by_position},
        )  # fmt: skip
    loaded = with_class_names(loaded, class_names)
    prepare = loaded.preprocessing

    def open_split(name: str) -> Any:
        opened = load_split(found.data, name, image_size=prepare.image_size, data_dir=data_dir)
        if opened.left_out:
            note(opened.left_out)
        return with_channels(opened, prepare.channels)

    examples = open_split(found.split)
    # Refuse a missing split before the evaluation.
    train = None
    if knn or probe:
        try:
            train = open_split(train_split)
        except UserError as error:
            raise UserError(
                f"--knn and --probe learn from --train-split {train_split}: {error}"
            ) from error
    if train is not None:
        _refuse_shared_images(train, examples, train_split, found.split)
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    result: dict[str, Any] = {
        "model": model_name,
        "data": found.data,
        "split": found.split,
        "preprocessing": prepare.to_dict(),
    }
    if head:
        title = f"{found.data} {found.split}"
        choices: dict[str, Any] = {"rule": rule or found.rule, "by_position": by_position}
        result |= _scores(loaded, examples, progress=title, **choices, **reading)
    else:
        result["counted"] = len(examples)
    if train is not None:
        result |= _features_accuracy(loaded, train, examples, knn=knn, probe=probe, **reading)
    if logits is not None:
        names = examples.class_names if by_position else loaded.label_names
        _write_logits(logits, loaded, examples, names, **reading)
    if confusion is not None:
        _draw_confusion(confusion, result)
    if output is not None:
        output.write_text(as_json(result) + "\n", encoding="utf-8")
    if json:
        click.echo(as_json(result))
    else:
        echo(_report(result))


def _load(
    load: Callable[..., LoadedModel], dtype_policy: dict[str, Any], *, headless: bool
) -> LoadedModel:
    """The model; without a head where its weights do not match one and --knn or --probe is given."""
    try:
        return load(**dtype_policy)
    except UserError as error:
        if not headless:
            raise
        try:
            loaded = load(**dtype_policy, num_classes=0)
        except UserError:
            raise error from None
        note(f"{error}; only --knn and --probe are measured")
        return loaded


def _refuse_without_head(measured: bool, **options: Any) -> None:
    if not measured:
        raise UserError(
            "this model has no head, so it knows no classes: measure its features with --knn or --probe"
        )
    for name, value in options.items():
        if value:
            raise UserError(f"{name} needs a head, and this model has none: leave it out")


def _refuse_shared_images(train: Any, test: Any, train_name: str, name: str) -> None:
    """Refuses --knn and --probe on training images, which they would classify by heart."""
    files = [getattr(getattr(split, "records", None), "files", None) for split in (train, test)]
    roots = [getattr(getattr(split, "records", None), "root", None) for split in (train, test)]
    shared = train_name == name
    if files[0] is not None and files[1] is not None and roots[0] == roots[1]:
        shared = not set(files[0]).isdisjoint(files[1])
    if shared:
        raise UserError(
            f"--knn and --probe learn from split {train_name!r}, which shares images with split {name!r} that "
            "they are measured on: choose others with --split and --train-split, such as --split val"
        )


def _scores(
    loaded: LoadedModel, examples: Any, *, by_position: bool, **options: Any
) -> dict[str, Any]:
    from cait_jax.evaluation.scores import score

    scores = score(
        loaded.model,
        loaded.variables,
        examples,
        loaded.preprocessing,
        class_names=loaded.label_names,
        by_position=by_position,
        **options,
    )
    result = scores.as_dict()
    if scores.matched == "position":
        result["data_names"] = list(examples.class_names)
    return result


def _features_accuracy(
    loaded: LoadedModel, train: Any, test: Any, *, knn: bool, probe: bool, **reading: Any
) -> dict[str, Any]:
    """k-NN and linear-probe accuracy on the labelled images."""
    from cait_jax.evaluation.features import features_of_split, knn_accuracy, probe_accuracy
    from cait_jax.evaluation.labels import labels_among, read_labels

    # Refuse classes that cannot be matched before the evaluation.
    if train.class_names != test.class_names:
        labels_among(train.class_names, test.class_names, read_labels(test))
    parts = []
    for split, title in ((train, "features to learn from"), (test, "features to classify")):
        features, labels = features_of_split(
            loaded.model, loaded.variables, split, loaded.preprocessing, title=title, **reading
        )
        labels = labels_among(train.class_names, split.class_names, labels)
        parts += [features[labels >= 0], labels[labels >= 0]]
    result: dict[str, Any] = {}
    if knn:
        result["knn_k"] = min(_NEIGHBOURS, len(parts[0]))
        result["knn"] = knn_accuracy(*parts, k=result["knn_k"])
    if probe:
        result["probe"] = probe_accuracy(*parts)
    return result


def _write_logits(
    path: Path, loaded: LoadedModel, examples: Any, names: tuple[str, ...] | None, **reading: Any
) -> None:
    import numpy as np

    from cait_jax.evaluation.features import features_of_split

    def logits_of(model: Any, variables: Any, images: Any) -> Any:
        return model.apply(variables, images)

    rows, _ = features_of_split(
        loaded.model, loaded.variables, examples, loaded.preprocessing, title="logits",
        feature_fn=logits_of, **reading,
    )  # fmt: skip
    arrays: dict[str, Any] = {"logits": rows}
    if names is not None:
        arrays["class_names"] = np.array(names)
    with path.open("wb") as file:  # NumPy would add a suffix to a name without one
        np.savez(file, **arrays)


def _draw_confusion(path: Path, result: dict[str, Any]) -> None:
    import numpy as np

    from cait_jax.evaluation.labels import class_words
    from cait_jax.explain.figures import confusion_matrix, save

    title = f"{result['model']} on {result['data']} {result['split']}"
    matrix = np.asarray(result["confusion"])
    save(confusion_matrix(matrix, class_words(result["class_names"]), title=title), path)


def _report(result: dict[str, Any]) -> str:
    """The scores as text."""

    def percent(value: float | None) -> str | None:
        return None if value is None else f"{value:.3%}"

    rows = [
        {"score": "top-1", "value": percent(result.get("top1"))},
        {"score": "top-5", "value": percent(result.get("top5"))},
        {"score": "loss (nats)", "value": result.get("loss") and f"{result['loss']:.5f}"},
        {"score": "calibration error", "value": percent(result.get("ece"))},
        {"score": f"k-NN (k={result.get('knn_k')})", "value": percent(result.get("knn"))},
        {"score": "linear probe", "value": percent(result.get("probe"))},
    ]
    lines = [
        printable(
            f"{result['model']} on {result['counted']:,} images of {result['data']} {result['split']}"
        ),
        *_competing(result),
        "",
        table([row for row in rows if row["value"] is not None]),
    ]
    per_class: list[tuple[float, str, int]] = []
    if result.get("class_accuracy") is not None:
        columns = (result["class_accuracy"], result["class_names"], result["class_images"])
        per_class = [row for row in zip(*columns, strict=True) if row[2]]
    if per_class:
        from cait_jax.evaluation.labels import class_words

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


def _competing(result: dict[str, Any]) -> list[str]:
    """Which classes compete, and how labels were matched if not by name."""
    if "classes" not in result:
        return [
            "the model has no head: its features are measured, with what --knn and --probe learn"
        ]
    competing, classes = result["competing"], result["classes"]
    if competing == classes:
        lines = [f"all {classes:,} classes of the model compete"]
    else:
        lines = [
            f"only {competing:,} of the model's {classes:,} classes compete, those that occur; with --rule all "
            "every class does"
        ]
    if result["matched"] == "position":
        names = [printable(name) for name in result["data_names"]]
        order = ", ".join(f"{name!r} is {i}" for i, name in enumerate(names[:_FEW_CLASSES]))
        more = ", ..." if len(names) > _FEW_CLASSES else ""
        lines.append(f"labels are matched by position, not by name: {order}{more}")
    return lines
