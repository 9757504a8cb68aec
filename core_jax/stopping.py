"""SIGTERM for processes that share work without going in step: each stops between two pieces.

Training saves on SIGTERM and has `core_jax.train.preemption`. Caching, captioning, distillation and
answering have nothing to save: what is finished (a shard, a batch, a chunk) is on the disk, and the
same command goes on from it.
"""

import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType

import jax

from core_jax.distributed import PREEMPTED


def stop_between(at: Callable[[str], None]) -> Callable[[str], None]:
    """`at`, which also ends the process by status 143 once SIGTERM has come.

    A process that is alone is ended by SIGTERM at once. One of several must not be: the end of
    process 0 aborts all others in the middle of their work. Launchers pass SIGTERM on to all, each
    stops after the piece that it is at, and they leave together; so the handler stays for good,
    also for a process that has nothing left to do and waits for the others.

    Args:
      at: what the job calls between its pieces of work (`Watchdog.at`).

    Raises:
      SystemExit: from the function that is returned.
    """
    alone = not jax.distributed.is_initialized()
    if alone or threading.current_thread() is not threading.main_thread():
        return at
    received = threading.Event()

    def on_signal(number: int, frame: FrameType | None) -> None:
        del number, frame
        received.set()

    def stop_or_go_on(place: str) -> None:
        if received.is_set():
            print(f"SIGTERM: stopped at {place}; the same command goes on", file=sys.stderr)
            raise SystemExit(PREEMPTED)
        at(place)

    signal.signal(signal.SIGTERM, on_signal)
    return stop_or_go_on
