"""Whether every file of a split can be read, before hours are spent on it."""

import functools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from cait_jax.data.folder import FolderRecords
from cait_jax.data.sources import Encoded, Split, read_record, record_name
from cait_jax.errors import UserError, some

_HEAD_BYTES = 2**16
_SAMPLE = 64
_TOGETHER = 1024


def check_images(
    split: Split,
    *,
    decode_all_within: float = 60.0,
    may_be_broken: float = 0.0,
    progress: Callable[[int], object] = lambda images: None,
) -> int:
    """Reads the header of every image, and decodes all of them where that is quick.

    How long decoding takes is measured on a sample spread over the split, whose images are decoded in any case.
    Images in memory are not read again.

    Args:
      split: the images.
      decode_all_within: seconds that decoding all may take.
      may_be_broken: the part of the images that may be broken: 0 in evaluation, `pipeline.MAX_BROKEN` in training,
        which replaces them.
      progress: called in this thread with the number of images read since its last call.

    Returns:
      How many images are broken.

    Raises:
      UserError: more are broken than may be; four of them are named.
    """
    if not isinstance(split, Encoded):
        return 0
    count = len(split)
    step = max(1, count // _SAMPLE)
    sample = list(range(0, count, step))[:_SAMPLE]
    with ThreadPoolExecutor(min(16, 2 * (os.cpu_count() or 1))) as pool:
        start = time.monotonic()
        errors = _errors(split, sample, _decoded, pool)
        decoding = (time.monotonic() - start) / max(len(sample), 1) * count <= decode_all_within
        rest = sorted(set(range(count)) - set(sample))
        progress(len(sample))
        for part in _parts(rest):
            errors |= _errors(split, part, _decoded if decoding else _header, pool)
            progress(len(part))
    if len(errors) > may_be_broken * count:
        first = min(errors)
        several = len(errors) > 1
        raise UserError(
            f"{len(errors)} of {count} images cannot be read: "
            f"{some([_name(split, index) for index in sorted(errors)])} "
            f"({'the first: ' * several}{errors[first]}); remove or replace {'them' if several else 'it'}"
        )
    return len(errors)


def _parts(indices: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), _TOGETHER):
        yield indices[start : start + _TOGETHER]


def _errors(
    split: Encoded,
    indices: Sequence[int],
    read: Callable[[Encoded, int], None],
    pool: ThreadPoolExecutor,
) -> dict[int, str]:
    """What is broken, by index."""
    found = pool.map(functools.partial(_error, split, read), indices)
    return {index: error for index, error in zip(indices, found, strict=True) if error}


def _error(split: Encoded, read: Callable[[Encoded, int], None], index: int) -> str:
    from cait_jax.data.decode import BrokenImage

    try:
        read(split, index)
    except BrokenImage as error:
        return str(error)
    return ""


def _decoded(split: Encoded, index: int) -> None:
    from cait_jax.data.decode import decode_image

    decode_image(read_record(split, index)["image"], channels=split.channels)


def _header(split: Encoded, index: int) -> None:
    from cait_jax.data.decode import BrokenImage, read_header

    if isinstance(split.records, FolderRecords):
        try:
            with (split.records.root / split.records.files[index]).open("rb") as file:
                read_header(file.read(_HEAD_BYTES))
            return
        except (OSError, BrokenImage):
            pass  # the header is longer, or the whole says what is wrong
    read_header(read_record(split, index)["image"])


def _name(split: Encoded, index: int) -> str:
    if isinstance(split.records, FolderRecords):
        return str(split.records.root / split.records.files[index])
    try:
        return record_name(index, read_record(split, index))
    except UserError:
        return f"image {index}"
