"""Splits that stand for data that are elsewhere: their classes and channels, and no images."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cait_jax.data.sources import Encoded, Split, is_folder, is_made_here, load_split
from cait_jax.errors import UserError

_EXAMPLES = 1_281_167  # of ImageNet-1k; the length of the schedule hangs on it, no shape does


@dataclass(frozen=True)
class Unread:
    """Records that are counted and cannot be read."""

    count: int

    def __len__(self) -> int:
        """The number of records."""
        return self.count

    def __getitem__(self, index: int, /) -> Mapping[str, Any]:
        """Refused."""
        raise UserError(f"image {index} stands for one that is elsewhere")


def unread_split(
    name: str, split: str, *, image_size: tuple[int, int], data_dir: str | None = None
) -> Split:
    """A split with the classes and channels of a data set that need not be on this machine.

    Args:
      name: as for `load_split`; TFDS's are known by their code, folders must be there.
      split: likewise.
      image_size: likewise.
      data_dir: likewise; what lies there is not read.

    Raises:
      UserError: the name is unknown, or the folder is not there.
    """
    if is_made_here(name) or is_folder(name):
        return load_split(name, split, image_size=image_size, data_dir=data_dir)
    from cait_jax.data.prepared import find_builder

    features = dict(find_builder(name, None).info.features.items())
    classes = getattr(features.get("label"), "num_classes", None)
    if not classes or "image" not in features:
        raise UserError(f"data set {name} does not pair an 'image' with a class 'label'")
    channels = 1 if features["image"].shape[-1] == 1 else 3
    return Encoded(Unread(_EXAMPLES), tuple(map(str, range(classes))), channels)
