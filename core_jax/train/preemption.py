"""SIGTERM, the notice that a machine is about to be taken away."""

import logging
import os
import signal
import threading
from types import FrameType
from typing import Any

import jax
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)


class PreemptionGuard:
    """Tells the loop when to save and stop; a context manager.

    In one process it catches SIGTERM itself; a second SIGTERM ends the process as usual. Under
    `jax.distributed`, whose preemption service has its own handler, the processes agree on one
    step at which all of them save, whichever of them got the signal.
    """

    def __init__(self) -> None:
        self._received = False
        self._previous: Any = None
        self._installed = False

    def __enter__(self) -> "PreemptionGuard":
        if jax.distributed.is_initialized():
            return self
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not in the main thread: SIGTERM will end the run without a checkpoint")
            return self
        self._previous = signal.signal(signal.SIGTERM, self._on_signal)
        self._installed = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, self._previous or signal.SIG_DFL)
            self._installed = False

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._received:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = True

    def requested(self, step: int) -> bool:
        """Whether to save and stop after `step`; every process must ask after every step."""
        if jax.distributed.is_initialized():
            try:
                return bool(multihost_utils.reached_preemption_sync_point(step))
            except RuntimeError:  # the service is disabled by jax_enable_preemption_service
                return False
        return self._received
