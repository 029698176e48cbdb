"""The classes of ImageNet-1k, by WordNet ID and in words."""

import functools
import importlib.resources
from collections.abc import Sequence


@functools.cache
def imagenet_classes() -> tuple[tuple[str, str], ...]:
    """Lists the 1000 classes in the order of their labels, which is that of their WordNet IDs.

    Returns:
      WordNet ID and words of each, such as `("n01440764", "tench, Tinca tinca")`. The words are the lemmas of
      the synset in WordNet 3.0; two classes are a `"crane"`.
    """
    table = importlib.resources.files("cait_jax.data").joinpath("imagenet_classes.tsv")
    lines = table.read_text(encoding="utf-8").splitlines()
    rows = (line.split("\t") for line in lines if not line.startswith("#"))
    return tuple((wnid, words) for wnid, words in rows)


def class_words(names: Sequence[str]) -> tuple[str, ...]:
    """Puts words in the place of WordNet IDs.

    Args:
      names: names of classes.

    Returns:
      The names, with the words of `imagenet_classes` for each of its IDs.
    """
    words = dict(imagenet_classes())
    return tuple(words.get(name, name) for name in names)
