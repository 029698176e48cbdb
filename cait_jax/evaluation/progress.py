"""How far an evaluation has come: a bar on a terminal, now and then a line elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax

from cait_jax.errors import printable

SECONDS_BETWEEN_LINES = 30.0


@contextlib.contextmanager
def show_progress(total: int, title: str, stream: Any = None) -> Iterator[Callable[[int], None]]:
    """Shows images done, images/s and the time left. Only the first process shows anything.

    Args:
      total: the number of images over all processes.
      title: what is being done, such as `"imagenet_v2"`.
      stream: a text stream; None: standard error.

    Yields:
      A function to call with the number of images that this process has finished since its last call. All
      processes are taken to be equally fast.
    """
    if jax.process_index():
        yield lambda images: None
        return
    stream = sys.stderr if stream is None else stream
    title = printable(title)
    processes = jax.process_count()
    if not stream.isatty():
        yield _lines(total, title, stream, processes)
        return

    from tqdm import tqdm

    with tqdm(
        total=total, desc=title, unit="image", unit_scale=True, file=stream, leave=False
    ) as bar:

        def update(images: int) -> None:
            bar.update(min(images * processes, total - bar.n))

        yield update


def _lines(total: int, title: str, stream: Any, processes: int) -> Callable[[int], None]:
    start = last = time.monotonic()
    done = 0

    def update(images: int) -> None:
        nonlocal last, done
        done = min(total, done + images * processes)
        now = time.monotonic()
        if now - last >= SECONDS_BETWEEN_LINES:
            last = now
            rate = done / (now - start)
            stream.write(f"{title}: {done:,} of {total:,} images, {rate:,.0f} images/s\n")
            stream.flush()

    return update
