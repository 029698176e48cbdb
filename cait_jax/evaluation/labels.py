"""Matching the labels of a data set to the classes of a model, and the classes that compete."""

import dataclasses
import functools
import importlib.resources
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from cait_jax.data.split import InMemory, Split
from cait_jax.errors import Literal, UserError, Way, advise, composed, nearest, some
from cait_jax.evaluation.evaluate import Batch, MetricFn
from cait_jax.evaluation.metrics import any_of_labels, classification

RULES = ("all", "restricted", "real")
_CHUNK = 512


class LabelError(UserError):
    """Labels that cannot be scored as they are."""


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """WordNet ID and words of ImageNet-1k's classes in the order of their labels, which is that of the IDs.

    The words are the lemmas of the synset in WordNet 3.0, such as `"tench, Tinca tinca"`; two classes are a
    `"crane"`.
    """
    table = importlib.resources.files("cait_jax.evaluation").joinpath("imagenet_classes.tsv")
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple((wnid, words) for wnid, words in rows)


def class_words(names: Sequence[str]) -> tuple[str, ...]:
    """The names, with the words of `imagenet_classes` in place of its IDs."""
    words = dict(imagenet_classes())
    return tuple(words.get(name, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a model that compete, and the class of each label of a data set.

    Attributes:
      columns: indices of the competing classes in the model's logits, ascending; None: all.
      index: for each label of the data set its class's position among the competing ones, or -1.
      names: of the competing classes.
      matched: how the labels were matched to the model's classes: `"name"` or `"position"`.
    """

    columns: Int32[np.ndarray, "competing"] | None
    index: Int32[np.ndarray, "labels"]
    names: tuple[str, ...]
    matched: str = "name"


def match_classes(
    data_names: Sequence[str], model_names: Sequence[str] | None, num_classes: int
) -> Int32[np.ndarray, "labels"]:
    """Finds each of a data set's classes among those of a model, by name.

    These are tried in turn: the exact name, in Unicode's composed form (NFC); the name without regard to case,
    spaces and underscores; ImageNet's WordNet IDs replaced by their words; the value of a whole number, so that
    `"007"` is `"7"`; any part of a name with commas, such as `"tench, Tinca tinca"`. A number is a name like any
    other, whatever the order of the folders.

    For a model without names, `"0"`, `"1"`, ... in this order (in folders, up to 10 or with leading zeros) are
    indices. For a model of ImageNet's classes, `"0"` to `"999"` are indices in any order, as in ImageNet-V2's
    folders. Nothing else is matched by position.

    Args:
      data_names: in the order of the data set's labels.
      model_names: in the order of the model's logits; None if not known.
      num_classes: of the model.

    Returns:
      The model's class index of each label of the data set; `LabelError` names classes that are missing or
      ambiguous.
    """
    if model_names is not None and len(model_names) != num_classes:
        raise UserError(
            f"{len(model_names)} class names were given for a model of {num_classes} classes; give "
            "one for each, in the order of the model's outputs"
        )
    if model_names is None:
        if _numbered(data_names, num_classes):
            return np.arange(num_classes, dtype=np.int32)
        raise _nameless(data_names, num_classes)
    exact = _places(*([[composed(name)] for name in names] for names in (data_names, model_names)))
    if _in_words(data_names) == _in_words(model_names) and all(
        not places or label in places for label, places in enumerate(exact)
    ):
        return np.arange(num_classes, dtype=np.int32)
    if _numbered(sorted(data_names, key=_value), 1000) and _are_imagenet(model_names):
        return np.array([int(name) for name in data_names], np.int32)

    pairs = list(zip(data_names, _find(data_names, model_names, exact), strict=True))
    missing = [name for name, indices in pairs if not indices]
    if missing:
        theirs = [_normalised(name) for name in model_names]
        near = nearest(_normalised(missing[0]), theirs)
        hint = f" ({near})" if near.startswith("nearest") or len(theirs) <= 20 else ""
        raise LabelError(
            f"{len(missing)} of the data set's {len(pairs)} classes are none of the model's "
            f"{num_classes}: {some([repr(name) for name in missing])}{hint}: "
            + _advice(data_names, num_classes, "rename them, or evaluate another model")
        )
    unclear = [name for name, indices in pairs if len(indices) > 1]
    if unclear:
        raise LabelError(
            f"{len(unclear)} of the data set's {len(pairs)} classes could be more than one of the "
            f"model's {num_classes}: {some([repr(name) for name in unclear])}: give names that tell the "
            "classes apart"
        )
    return np.array([indices.pop() for _, indices in pairs], np.int32)


def match_positions(data_names: Sequence[str], num_classes: int) -> Int32[np.ndarray, "labels"]:
    """The class index of each label where the caller says that label i is the model's class i."""
    if len(data_names) != num_classes:
        raise UserError(
            f"the data set has {len(data_names)} classes and the model {num_classes}, so positions do not "
            "match them: give the names of the model's classes"
        )
    return np.arange(num_classes, dtype=np.int32)


def read_labels(split: Split) -> Int32[np.ndarray, "n"]:
    """The labels of a split in its order, without decoding images.

    Where the split's records have an attribute `labels`, no record is read either.
    """
    if isinstance(split, InMemory):
        return split.labels
    records: Any = split.records
    if hasattr(records, "labels"):
        return np.asarray(records.labels, np.int32)
    if not hasattr(records, "__getitems__"):
        return np.array([records[i]["label"] for i in range(len(records))], np.int32)
    labels = np.empty(len(records), np.int32)
    for start in range(0, len(records), _CHUNK):
        chunk = range(start, min(start + _CHUNK, len(records)))
        labels[chunk.start : chunk.stop] = [
            record["label"] for record in records.__getitems__(list(chunk))
        ]
    return labels


def choose_rule(split: Split, num_classes: int) -> str:
    """`"real"` for a multi-label split, `"restricted"` for one with fewer classes than the model, else `"all"`."""
    if not isinstance(split, InMemory) and split.multi_label:
        return "real"
    return "restricted" if split.num_classes < num_classes else "all"


def choose_classes(
    split: Split,
    rule: str,
    num_classes: int,
    model_names: Sequence[str] | None = None,
    *,
    by_position: bool = False,
) -> Classes:
    """Decides which of a model's `num_classes` classes compete on a split.

    With the rule `"restricted"` those that occur in the split, which takes a pass over its labels; else all.
    Classes are matched by `match_classes`, or `by_position` by `match_positions`.
    """
    if rule not in RULES:
        raise UserError(f"there is no rule {rule!r}; {nearest(rule, RULES)}")
    if rule == "real" and (isinstance(split, InMemory) or not split.multi_label):
        raise UserError(
            "the rule 'real' needs any number of labels an image, which this split has not; "
            "choose the data set imagenet_real or another rule"
        )
    if num_classes == 1:
        raise UserError(
            "a model of one class is right whatever it sees: evaluate one of more classes"
        )
    if by_position:
        index, matched = match_positions(split.class_names, num_classes), "position"
    else:
        index, matched = match_classes(split.class_names, model_names, num_classes), "name"
    names = [str(i) for i in range(num_classes)]
    for name, i in zip(split.class_names, index, strict=True):
        names[i] = name
    if model_names is not None:
        names = list(model_names)
    if rule != "restricted":
        return Classes(None, index, tuple(names), matched)

    labels = read_labels(split)
    columns = np.unique(index[labels[labels >= 0]])
    if len(columns) == num_classes:
        return Classes(None, index, tuple(names), matched)
    if len(columns) == 1:
        raise LabelError(
            f"all images are of one of the model's {num_classes} classes, {names[columns[0]]!r}, and where only "
            "the classes that occur compete, every answer is right: "
            + advise(
                "add images of other classes", Way("let all classes compete with {}", "rule", "all")
            )
        )
    position = np.full(num_classes, -1, np.int32)
    position[columns] = np.arange(len(columns), dtype=np.int32)
    return Classes(columns, position[index], tuple(names[i] for i in columns), matched)


def labels_among(
    names: Sequence[str], of_names: Sequence[str], labels: Int32[np.ndarray, "n"]
) -> Int32[np.ndarray, "n"]:
    """Translates labels of the classes `of_names` to `names` by `match_classes`; below 0 (no label) becomes -1."""
    occurring = np.unique(labels[labels >= 0])
    index = np.full(len(of_names), -1, np.int32)
    if list(names) == list(of_names):
        index[:] = np.arange(len(names))
    else:
        try:
            index[occurring] = match_classes([of_names[i] for i in occurring], names, len(names))
        except LabelError as error:
            strange = sorted({of_names[i] for i in occurring} - set(names))
            raise UserError(
                "the split to measure on has classes that cannot be found in the split to learn from: "
                f"{some(strange)}; choose splits of the same classes"
            ) from error
    return np.where(labels < 0, -1, index[np.maximum(labels, 0)]).astype(np.int32)


def metric_fn_for(rule: str, classes: Classes) -> MetricFn:
    """The metric function of `rule`, of the model's logits and a batch with the data set's own labels.

    Softmax, ranks and the sums are over the competing classes.
    """
    metric_fn = any_of_labels if rule == "real" else classification
    competing = len(classes.names)
    same = np.array_equal(classes.index, np.arange(competing))
    if classes.columns is None and same:
        return metric_fn

    def among_classes(logits: Array, batch: Batch) -> Any:
        index = jnp.asarray(classes.index)
        if classes.columns is not None:
            logits = logits[:, jnp.asarray(classes.columns)]
        label = batch["label"]
        batch = {**batch, "label": jnp.where(label < 0, -1, index[jnp.maximum(label, 0)])}
        if rule == "real":
            counts = jnp.zeros((len(label), competing), jnp.int32)
            counts = counts.at[:, index].add(batch["labels"].astype(jnp.int32))
            batch["labels"] = counts > 0
        return metric_fn(logits, batch)

    return among_classes


def _nameless(data_names: Sequence[str], num_classes: int) -> LabelError:
    return LabelError(
        f"the names of the model's {num_classes} classes are not known, so the data set's {len(data_names)} "
        f"({some([repr(name) for name in data_names])}) cannot be matched: "
        + _advice(data_names, num_classes)
    )


def _advice(data_names: Sequence[str], num_classes: int, *others: str) -> str:
    """What a user can do where names do not match."""
    ways: list[Way | str] = [
        *others,
        Way("give the model's classes names with {}", "class_names", Literal("FILE")),
    ]
    if len(data_names) == num_classes:
        order = some([repr(name) for name in data_names])
        ways.append(
            Way(
                f"give {{}} if the model's classes are these in this order: {_literal(order)}",
                "by_position",
                True,
            )
        )
    return advise(*ways, otherwise="rename the classes")


def _literal(text: str) -> str:
    """Escapes the text for `str.format`."""
    return text.replace("{", "{{").replace("}", "}}")


def _normalised(name: str) -> str:
    return " ".join(composed(name).casefold().replace("_", " ").split())


def _find(ours: Sequence[str], theirs: Sequence[str], exact: list[set[int]]) -> list[set[int]]:
    """The indices in `theirs` of each of our names, by the first way of matching that finds any."""
    found = exact
    ways: tuple[Callable[[Sequence[str]], list[list[str]]], ...] = (
        lambda names: [[_normalised(name)] for name in names],
        lambda names: [[name] for name in _in_words(names)],
        _as_numbers,
        lambda names: [[part.strip() for part in name.split(",")] for name in _in_words(names)],
    )
    for way in ways:
        if not all(found):
            places = _places(way(ours), way(theirs))
            found = [first or then for first, then in zip(found, places, strict=True)]
    return found


def _places(ours: Iterable[Sequence[str]], theirs: Iterable[Sequence[str]]) -> list[set[int]]:
    """For each of our lists of keys, the indices of those of theirs that share a key."""
    places: dict[str, set[int]] = {}
    for i, keys in enumerate(theirs):
        for key in keys:
            places.setdefault(key, set()).add(i)
    return [set().union(*(places.get(key, ()) for key in keys)) for keys in ours]


def _in_words(names: Sequence[str]) -> list[str]:
    return [_normalised(word) for word in class_words([_normalised(name) for name in names])]


def _as_numbers(names: Sequence[str]) -> list[list[str]]:
    """The value of each name that is a whole number, if no other name of the list has the same value."""
    values = [_value(name) for name in names]
    often = Counter(values)
    return [[str(value)] if value >= 0 and often[value] == 1 else [] for value in values]


def _are_imagenet(names: Sequence[str]) -> bool:
    return _in_words(names) == [_normalised(words) for _, words in imagenet_classes()]


def _value(name: str) -> int:
    return int(name) if name.isdecimal() else -1


def _numbered(names: Sequence[str], count: int) -> bool:
    """Whether the names are the numbers from 0 to below `count` in order."""
    return len(names) == count and all(
        name.isdecimal() and int(name) == i for i, name in enumerate(names)
    )
