"""The test sets that models are compared on: where each is found, and how it is scored."""

import dataclasses

from cait_jax.data.layout import purpose_of
from cait_jax.data.sources import split_names
from cait_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """A split of a data set to score models on.

    Attributes:
      data: the data set as `cait_jax.data.load_split` takes it.
      split: the split.
      rule: see `cait_jax.evaluation.score`; None for the one that fits the split and the model.
    """

    data: str
    split: str
    rule: str | None = None


_BENCHMARKS = {
    # Russakovsky et al. 2015, arXiv 1409.0575: the labels of its test split are not public.
    "imagenet2012": Benchmark("imagenet2012", "validation", "all"),
    # Recht et al. 2019, arXiv 1902.10811.
    "imagenet_v2": Benchmark("imagenet_v2/matched-frequency", "test", "all"),
    # Beyer et al. 2020, arXiv 2006.07159.
    "imagenet2012_real": Benchmark("imagenet2012_real", "validation", "real"),
    # Hendrycks et al. 2021, arXiv 1907.07174; 200 classes.
    "imagenet_a": Benchmark("imagenet_a", "test", "restricted"),
    # Hendrycks et al. 2021, arXiv 2006.16241; 200 classes.
    "imagenet_r": Benchmark("imagenet_r", "test", "restricted"),
    # Wang et al. 2019, arXiv 1905.13549.
    "imagenet_sketch": Benchmark("imagenet_sketch", "test", "all"),
}
_ALIASES = {"imagenet": "imagenet2012", "imagenet_real": "imagenet2012_real"}
_DEFAULT_PURPOSES = ("test", "val")
_UNDIVIDED = "all"  # a folder that is not divided into splits


def find_benchmark(
    name: str, split: str | None = None, *, data_dir: str | None = None
) -> Benchmark:
    """Decides which split a name stands for, and by which rule it is scored.

    Args:
      name: `"imagenet"` (or `"imagenet2012"`), `"imagenet_v2"`, `"imagenet_real"`, `"imagenet_a"`, `"imagenet_r"`,
        `"imagenet_sketch"`, the same with a TFDS configuration or version, or any data set that
        `cait_jax.data.load_split` takes.
      split: the split; by default the benchmark's own, and of another data set the one for testing, else the one
        for validation, by any word of `cait_jax.data.layout.purpose_of`, or all of a folder that is not divided.
      data_dir: the folder of the TFDS data sets.

    Raises:
      UserError: there is no such data set, or it has none of the default splits.
    """
    base, *_ = name.replace(":", "/").split("/")
    known = _BENCHMARKS.get(_ALIASES.get(base, base))
    if known is not None:
        data = known.data if base == name else name.replace(base, _ALIASES.get(base, base), 1)
        return Benchmark(data, split or known.split, known.rule)
    if split is not None:
        return Benchmark(name, split)
    splits = split_names(name, data_dir=data_dir)
    for purpose in _DEFAULT_PURPOSES:
        if named := [each for each in splits if purpose_of(each) == purpose]:
            return Benchmark(name, named[0])
    if _UNDIVIDED in splits:
        return Benchmark(name, _UNDIVIDED)
    raise UserError(
        f"data set {name} has none of the splits test and validation; name one of its own, which are "
        f"{', '.join(splits)}"
    )
