"""Batches that begin to load before they are asked for, and whose end is not waited for."""

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

from cait_jax.data.pipeline import Batch, Batches


class Ahead(Iterator[Batch]):
    """A known number of batches, of which the first is being loaded from the start.

    Starting the processes that decode images, and ending them, takes seconds. A thread does both.
    """

    def __init__(self, batches: Batches, count: int) -> None:
        """Takes over `batches` and starts to load.

        Args:
          batches: what to iterate over.
          count: how many there are; after the last of them the end is not asked for.
        """
        self._batches = batches
        self._left = count
        self._thread: ThreadPoolExecutor | None = ThreadPoolExecutor(1, "ahead")
        self._first: Future[Batch] | None = self._thread.submit(next, batches)

    def __next__(self) -> Batch:
        """The next batch; none after `close`.

        Raises:
          BrokenImage: as `Batches` does, for the first batch too.
        """
        if self._thread is None or not self._left:
            raise StopIteration
        self._left -= 1
        first, self._first = self._first, None
        return next(self._batches) if first is None else first.result()

    def close(self) -> None:
        """Has the threads and processes behind the batches ended; calling it again does nothing."""
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.submit(self._batches.close)
            thread.shutdown(wait=False)

    def __enter__(self) -> "Ahead":
        """Returns itself."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Closes."""
        self.close()
