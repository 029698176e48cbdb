"""Model cards: the README.md of a repository on the Hugging Face hub, with metadata in YAML."""

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

import jax

from cait_jax.errors import printable
from cait_jax.models.inspect import abstract_variables

CARD = "README.md"
# What TFDS calls data sets, and the hub.
_HUB_DATASETS = {
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "imagenet2012": "ILSVRC/imagenet-1k",
    "mnist": "ylecun/mnist",
}
_MOST_CLASSES = 100


class Training(NamedTuple):
    """The run that a model is of.

    Attributes:
      step: of the checkpoint.
      data: the data set, as the config names it.
      split: that the metrics are of.
      metrics: by name, without `eval/`.
    """

    step: int
    data: str
    split: str
    metrics: Mapping[str, float]


class Card(NamedTuple):
    """What a model card says.

    Attributes:
      repository: `NAMESPACE/NAME`.
      model: the network.
      label_names: readable, in the order of the logits; empty where it has no head.
      preprocessing: its settings, or None.
      license: identifier of the hub, such as "apache-2.0", or None.
      datasets: on the hub, that the model was trained on; empty: the one of `training`, where it is known there.
      for_timm: whether timm has this network.
      training: None where it is not known.
      picture: file name of what the class token reads, and what it was drawn from; None: there is none.
      config: file name of the run's config, or None.
    """

    repository: str
    model: Any
    label_names: Sequence[str]
    preprocessing: Mapping[str, Any] | None
    license: str | None
    datasets: Sequence[str]
    for_timm: bool
    training: Training | None
    picture: tuple[str, str] | None
    config: str | None


def card_text(card: Card) -> str:
    """The model card, in the hub's Markdown."""
    name = card.repository.partition("/")[2]
    height, width = card.model.image_size
    count = sum(leaf.size for leaf in jax.tree.leaves(abstract_variables(card.model)))
    classes = f"{len(card.label_names)} classes" if card.label_names else "no head"
    lines = [
        "---", _metadata(card, name), "---", "",
        f"# {name}", "",
        f"A {type(card.model).__name__} of {count:,} parameters for images of {height} by {width} pixels, with "
        f"{classes}, in `cait_jax`.{_trained(card.training)}",
    ]  # fmt: skip
    if card.picture is not None:
        file, source = card.picture
        lines += ["", f"![What the class token reads]({file})", ""]
        lines += [
            f"What the class token reads from each patch of {source}, in each block and head."
        ]
    if card.training is not None and card.training.metrics:
        training = card.training
        lines += ["", "## Evaluation", ""]
        lines += [
            f"Split `{training.split}` of {_escaped(_last_part(training.data))}, after step {training.step:,}:",
            "",
        ]
        lines += ["| metric | value |", "|---|---|"]
        lines += [f"| {_words(key)} | {_value(key, v)} |" for key, v in training.metrics.items()]
    lines += ["", "## Use", "", *_use(card)]
    if card.label_names:
        shown = [_escaped(each) for each in card.label_names[:_MOST_CLASSES]]
        more = len(card.label_names) - len(shown)
        rest = f" and {more:,} more, in `config.json`" if more else ""
        lines += ["", "## Classes", "", f"In the order of the logits: {', '.join(shown)}{rest}."]
    return "\n".join(lines) + "\n"


def _metadata(card: Card, name: str) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    training = card.training
    task = "image-classification" if card.label_names else "image-feature-extraction"
    known = () if training is None else (_HUB_DATASETS.get(training.data.partition(":")[0]),)
    datasets = list(card.datasets) or [each for each in known if each]
    results, metrics = [], []
    if training is not None:
        for key in ("accuracy", "ema_accuracy"):
            if key in training.metrics and card.label_names:
                metrics = ["accuracy"]
                results.append(
                    EvalResult(
                        task_type=task,
                        dataset_type=datasets[0] if datasets else _kind(training.data),
                        dataset_name=_last_part(training.data),
                        dataset_split=training.split,
                        metric_type="accuracy",
                        metric_name=_words(key),
                        metric_value=round(float(training.metrics[key]), 6),
                    )
                )
    data = ModelCardData(
        model_name=name if results else None,
        license=card.license,
        library_name="timm" if card.for_timm else "cait-jax",
        pipeline_tag=task,
        tags=["cait_jax", "jax", "flax", *(["timm"] if card.for_timm else [])],
        datasets=datasets or None,
        metrics=metrics or None,
        eval_results=results or None,
    )
    return str(data.to_yaml()).rstrip()


def _kind(data: str) -> str:
    """What the hub calls a data set that it does not have."""
    return "imagefolder" if _is_path(data) else data


def _trained(training: Training | None) -> str:
    return (
        ""
        if training is None
        else f" Trained on {_escaped(_last_part(training.data))} for {training.step:,} steps."
    )


def _use(card: Card) -> list[str]:
    address = f"hf://{card.repository}"
    lines = [
        "In JAX, by `pip install cait-jax`:", "",
        "```python",
        "import cait_jax", "",
        f'model, variables = cait_jax.load_pretrained("{address}")',
    ]  # fmt: skip
    if card.preprocessing is not None:
        lines += [
            f'images = cait_jax.preprocessing("{address}")(["photograph.jpg"])',
            "outputs = model.apply(variables, images)",
        ]
    lines += ["```"]
    if card.for_timm:
        lines += [
            "", "In PyTorch, with the same weights:", "",
            "```python",
            "import timm", "",
            f'model = timm.create_model("hf-hub:{card.repository}", pretrained=True).eval()',
            "```",
        ]  # fmt: skip
    if card.preprocessing is not None:
        mean, std = (_numbers(card.preprocessing[key]) for key in ("mean", "std"))
        lines += [
            "",
            f"Images are resized to cover the size over {card.preprocessing['crop_pct']}, cropped in the middle, "
            f"and normalised by mean {mean} and standard deviation {std} on a scale from 0 to 1.",
        ]
    if card.config is not None:
        lines += [
            "",
            f"`{card.config}` is the config of the training, with folders by their names alone.",
        ]
    return lines


def shareable(config: Any) -> Any:
    """A config as JSON without the places of files: of an absolute path the last part is left."""
    if isinstance(config, Mapping):
        return {key: shareable(value) for key, value in config.items()}
    if isinstance(config, list | tuple):
        return [shareable(value) for value in config]
    return _last_part(config) if isinstance(config, str) else config


def _last_part(text: str) -> str:
    return PurePath(text).name if _is_path(text) else text


def _is_path(text: str) -> bool:
    return text.startswith(("/", "~", "."))


def _escaped(text: str) -> str:
    """Text that Markdown shows as it is."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", printable(text))


def _numbers(values: Sequence[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _words(key: str) -> str:
    words = key.removeprefix("ema_").replace("_", " ")
    return f"{words} of averaged parameters" if key.startswith("ema_") else words


def _value(key: str, value: float) -> str:
    return f"{value:.2%}" if key.endswith("accuracy") else f"{value:.5g}"
