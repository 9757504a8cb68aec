"""Work on the host beside the device: reading ahead in threads, and telling how far a job is."""

import collections
import concurrent.futures
import time
from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from core_jax.train.metrics import format_seconds

In = TypeVar("In")
Out = TypeVar("Out")


def map_ahead(
    function: Callable[[In], Out], items: Iterable[In], *, num_threads: int, ahead: int
) -> Iterator[Out]:
    """Yields `function(item)` in the items' order, computed by threads up to `ahead` in advance.

    At most `ahead` results are held, however long `items` is. An exception comes out at its
    item's place.
    """
    with concurrent.futures.ThreadPoolExecutor(max(1, num_threads)) as pool:
        pending: collections.deque[concurrent.futures.Future] = collections.deque()
        try:
            for item in items:
                pending.append(pool.submit(function, item))
                if len(pending) >= max(1, ahead):
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:  # the consumer stopped early: don't decode for nobody
                future.cancel()


class Progress:
    """Prints `done/total images, rate, ETA` every few seconds.

    The rate leaves the first report out, since that one waited for the compiler.

    Args:
      total: images of this job.
      every: seconds between two lines.
      at: told how far the job is, at every batch (`Watchdog.at`).
    """

    def __init__(
        self, total: int, *, every: float = 10.0, at: Callable[[str], None] = lambda place: None
    ):
        self._total, self._every, self._at = total, every, at
        self._started = self._printed = time.perf_counter()
        self._done = self._first_done = 0
        self._first_at: float | None = None

    @property
    def rate(self) -> float:
        """Images a second, without the first batch where there are others."""
        now = time.perf_counter()
        if self._first_at is not None and self._done > self._first_done:
            return (self._done - self._first_done) / max(now - self._first_at, 1e-9)
        return self._done / max(now - self._started, 1e-9)

    def add(self, count: int) -> None:
        """Books images that are done, and prints a line where it is time."""
        self._done += count
        self._at(f"image {self._done} of {self._total}")
        now = time.perf_counter()
        if self._first_at is None:
            self._first_at, self._first_done = now, self._done
        if now - self._printed >= self._every:
            self._printed = now
            eta = format_seconds((self._total - self._done) / max(self.rate, 1e-9))
            print(
                f"{self._done}/{self._total} images, {self.rate:.1f} images/s, ETA {eta}",
                flush=True,
            )

    def close(self) -> None:
        """Prints the last line."""
        seconds = time.perf_counter() - self._started
        print(
            f"{self._done} images in {format_seconds(seconds)}, {self.rate:.1f} images/s "
            "(first batch, which compiles, left out)",
            flush=True,
        )
