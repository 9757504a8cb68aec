"""Seconds of a call, and what is told of many."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any


@dataclasses.dataclass
class Measured:
    """What one process found.

    Attributes:
      seconds: measure -> seconds of each timed call.
      first_call: measure -> seconds of the very first call, compilation included.
      outputs: measure -> an array that both sides should agree on.
      facts: anything else worth keeping: numbers and texts, JSON-like.
    """

    seconds: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    first_call: dict[str, float] = dataclasses.field(default_factory=dict)
    outputs: dict[str, Any] = dataclasses.field(default_factory=dict)
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    def time(
        self, measure: str, call: Callable[[], Any], *, repeats: int, warmup: int = 1
    ) -> Any:
        """Times a call and returns its last result.

        Args:
          measure: the name to keep the times under.
          call: must not return before the work is done (`jax.block_until_ready`).
          repeats: timed calls.
          warmup: calls between the first and the timed ones.
        """
        began = time.perf_counter()
        result = call()
        self.first_call[measure] = time.perf_counter() - began
        for _ in range(warmup):
            result = call()
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            result = call()
            times.append(time.perf_counter() - began)
        self.seconds[measure] = times
        return result


def summarize(rounds: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Min, median and max over the calls of all processes, and the median of each process.

    Args:
      rounds: seconds of the calls of each process, none empty.
    """
    times = [t for calls in rounds for t in calls]
    return {
        "calls": len(times),
        "min": min(times),
        "median": statistics.median(times),
        "max": max(times),
        "round_medians": [statistics.median(calls) for calls in rounds],
    }


def ratio(ours: dict[str, Any], peer: dict[str, Any]) -> dict[str, float]:
    """Peer's time over ours, of all calls and of each pair of neighbouring processes."""
    pairs = zip(ours["round_medians"], peer["round_medians"], strict=True)
    rounds = [b / a for a, b in pairs]
    return {"median": peer["median"] / ours["median"], "min": min(rounds), "max": max(rounds)}
