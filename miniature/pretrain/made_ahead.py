"""Batches made ahead of their use by another process.

Texts are put together and tokenised in Python, which only one thread of a process does at a time.
The steps of the largest language model took no less time for it (its own work is what takes long);
for the small one that has not been measured.
"""

import collections
import concurrent.futures
import multiprocessing
from collections.abc import Callable, Iterator
from typing import Any

AHEAD = 8


def made_ahead(make: Callable[[int], Any], start: int) -> Iterator[Any]:
    """make(start), make(start + 1), ... without end.

    Args:
      make: a function of the step alone, with all it needs, that can be pickled.
      start: the first step.
    """
    # Not forked: the networks' threads would not survive it.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        coming = collections.deque(pool.submit(make, start + i) for i in range(AHEAD))
        step = start + AHEAD
        try:
            while True:
                yield coming.popleft().result()
                coming.append(pool.submit(make, step))
                step += 1
        finally:
            for future in coming:
                future.cancel()
