"""How the labels of a data set are read against the classes of a model."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int32

from cait_jax.data.imagenet import class_words
from cait_jax.data.sources import InMemory, Split
from cait_jax.errors import UserError, nearest, some
from cait_jax.evaluation.metrics import Batch, Measure, any_of_labels, classification

RULES = ("all", "restricted", "real")
_CHUNK = 512


@dataclasses.dataclass(frozen=True)
class Classes:
    """Which classes of a model compete, and which of them each label of a data set means.

    Attributes:
      columns: int32 (competing,), the model's class indices in rising order; None: all classes compete.
      index: int32 (labels,), for each label of the data set the position of its class among those that
        compete, -1 if it is not one of them.
      names: the names of the competing classes.
    """

    columns: Int32[np.ndarray, "competing"] | None
    index: Int32[np.ndarray, "labels"]
    names: tuple[str, ...]


def match_classes(
    data_names: Sequence[str], model_names: Sequence[str] | None, num_classes: int
) -> Int32[np.ndarray, "labels"]:
    """Finds a data set's classes among those of a model, by name.

    Case does not matter, nor whether words are parted by spaces or underscores. A WordNet ID of ImageNet equals
    its words, and of a name with commas, such as `"tench, Tinca tinca"`, each part is a name; but a whole name
    found as it stands comes first. Names that only count (`"0"`, `"1"`, ...) are none. Where a side has no names,
    the numbers of classes must be the same, and so are the indices.

    Args:
      data_names: the names of the data set's classes in the order of its labels.
      model_names: the names of the model's classes in the order of its logits; None if not known.
      num_classes: the number of the model's classes.

    Returns:
      For each label of the data set the index of its class in the model, int32.

    Raises:
      UserError: naming the classes that cannot be found or told apart.
    """
    if model_names is not None and len(model_names) != num_classes:
        raise UserError(
            f"{len(model_names)} class names were given for a model of {num_classes} classes; give "
            "one for each, in the order of the model's outputs"
        )
    ours = [_normalised(name) for name in data_names]
    theirs = [_normalised(name) for name in model_names or ()]
    if _in_words(ours) == _in_words(theirs):
        return np.arange(num_classes, dtype=np.int32)
    if _only_count(ours) or _only_count(theirs):
        if len(ours) == num_classes:
            return np.arange(num_classes, dtype=np.int32)
        side = "model's" if _only_count(theirs) else "data set's"
        raise UserError(
            f"the data set has {len(ours)} classes and the model {num_classes}, and the names of "
            f"the {side} classes are not known, so they cannot be matched; give the {side} class names"
        )

    found = _find(ours, theirs)
    pairs = list(zip(data_names, found, strict=True))
    missing = [name for name, indices in pairs if not indices]
    if missing:
        near = nearest(_normalised(missing[0]), theirs)
        hint = f" ({near})" if near.startswith("nearest") or len(theirs) <= 20 else ""
        raise UserError(
            f"{len(missing)} of the data set's {len(ours)} classes are none of the model's "
            f"{num_classes}: {some([repr(name) for name in missing])}{hint}; rename them or evaluate another model"
        )
    unclear = [name for name, indices in pairs if len(indices) > 1]
    if unclear:
        raise UserError(
            f"{len(unclear)} of the data set's {len(ours)} classes could be more than one of the "
            f"model's {num_classes}: {some([repr(name) for name in unclear])}; give names that tell the "
            "classes apart"
        )
    return np.array([indices.pop() for _, indices in pairs], np.int32)


def read_labels(split: Split) -> Int32[np.ndarray, "n"]:
    """The labels of a split in its order. No image is decoded.

    Args:
      split: any split. If its records have an attribute `labels`, no record is read either.
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
    """The rule for a split that is no known benchmark.

    It is `"real"`, if the split has any number of labels an image; `"restricted"`, if it has fewer classes than
    the model's `num_classes`; else `"all"`.
    """
    if not isinstance(split, InMemory) and split.multi_label:
        return "real"
    return "restricted" if split.num_classes < num_classes else "all"


def choose_classes(
    split: Split, rule: str, num_classes: int, model_names: Sequence[str] | None = None
) -> Classes:
    """Decides which of a model's classes compete on a split.

    Args:
      split: the examples.
      rule: `"restricted"`: the classes that occur in the split, which takes a pass over its labels; else all.
      num_classes: the number of the model's classes.
      model_names: as in `match_classes`.

    Raises:
      UserError: the classes cannot be matched, or the rule is unknown or asks for labels that the split has not.
    """
    if rule not in RULES:
        raise UserError(f"there is no rule {rule!r}; {nearest(rule, RULES)}")
    if rule == "real" and (isinstance(split, InMemory) or not split.multi_label):
        raise UserError(
            "the rule 'real' needs any number of labels an image, which this split has not; "
            "choose the data set imagenet_real or another rule"
        )
    index = match_classes(split.class_names, model_names, num_classes)
    names = [str(i) for i in range(num_classes)]
    for name, i in zip(split.class_names, index, strict=True):
        names[i] = name
    if model_names is not None:
        names = list(model_names)
    if rule != "restricted":
        return Classes(None, index, tuple(names))

    labels = read_labels(split)
    columns = np.unique(index[labels[labels >= 0]])
    if len(columns) == num_classes:
        return Classes(None, index, tuple(names))
    position = np.full(num_classes, -1, np.int32)
    position[columns] = np.arange(len(columns), dtype=np.int32)
    return Classes(columns, position[index], tuple(names[i] for i in columns))


def measure_of(rule: str, classes: Classes) -> Measure:
    """The measure of `rule` among `classes`: softmax and ranks know the competing classes alone.

    Returns:
      A measure of the model's logits and of a batch with the data set's own labels. Its sums are over
      `classes`.
    """
    measure = any_of_labels if rule == "real" else classification
    competing = len(classes.names)
    same = np.array_equal(classes.index, np.arange(competing))
    if classes.columns is None and same:
        return measure

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
        return measure(logits, batch)

    return among_classes


def _normalised(name: str) -> str:
    return " ".join(name.casefold().replace("_", " ").split())


def _find(ours: Sequence[str], theirs: Sequence[str]) -> list[set[int]]:
    """For each of our names the places of theirs that are it: as it stands, else in words, else in part."""
    found: list[set[int]] = [set() for _ in ours]
    for known, names in (
        ([[name] for name in theirs], [[name] for name in ours]),
        ([[name] for name in _in_words(theirs)], [[name] for name in _in_words(ours)]),
        (_in_parts(theirs), _in_parts(ours)),
    ):
        places: dict[str, set[int]] = {}
        for i, keys in enumerate(known):
            for key in keys:
                places.setdefault(key, set()).add(i)
        found = [
            some or set().union(*(places.get(key, ()) for key in keys))
            for some, keys in zip(found, names, strict=True)
        ]
    return found


def _in_words(names: Sequence[str]) -> list[str]:
    return [_normalised(name) for name in class_words(names)]


def _in_parts(names: Sequence[str]) -> list[list[str]]:
    return [[part.strip() for part in name.split(",")] for name in _in_words(names)]


def _only_count(names: Sequence[str]) -> bool:
    return all(name == str(i) for i, name in enumerate(names))
