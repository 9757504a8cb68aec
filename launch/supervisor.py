"""Runs the processes of a local job: one fate for all, their lines prefixed, restarts.

A signal goes to all. When one dies, the others would wait for it for minutes; they are given a
moment to say what they saw, and are then ended, and the message names who died first and of what.
"""

import contextlib
import ctypes
import dataclasses
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import TextIO

from core_jax.distributed import PREEMPTED
from launch.local import LocalProcess, environment

_TICK = 0.05
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fate:
    """How a group of processes ended.

    Attributes:
      status: for the shell: 0, the first that died's, or 143 after SIGTERM and a save.
      message: who died first and how; empty where all went well.
      stopped: whether a signal to the launcher ended it.
    """

    status: int
    message: str = ""
    stopped: bool = False


class Supervisor:
    """Runs groups of processes, one after another; signals reach the group that runs.

    Args:
      grace_seconds: between SIGTERM and SIGKILL.
      patience_seconds: that the others get after one died.
      out: where prefixed lines go.
    """

    def __init__(
        self, *, grace_seconds: float, patience_seconds: float = 5.0, out: TextIO | None = None
    ) -> None:
        self.grace_seconds, self.patience_seconds = grace_seconds, patience_seconds
        self._out = sys.stdout if out is None else out
        self._lock = threading.Lock()
        self._signals = 0
        self._processes: list[subprocess.Popen[str]] = []

    def run(
        self,
        make: Callable[[], Sequence[LocalProcess]],
        *,
        max_restarts: int = 0,
    ) -> Fate:
        """Runs a group to its end, and again after a failure.

        Args:
          make: the processes of one attempt (with a new port).
          max_restarts: attempts after the first.
        """
        handled = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
        previous = {number: signal.signal(number, self._on_signal) for number in handled}
        try:
            for attempt in range(max_restarts + 1):
                fate = self._run_once(make())
                if fate.message:
                    self._say(fate.message)
                if fate.status == 0 or fate.stopped or attempt == max_restarts:
                    break
                self._say(f"restart {attempt + 1} of {max_restarts}")
            return fate
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _on_signal(self, number: int, frame: object) -> None:
        """The first asks all to save and end, whatever it was; the second ends them."""
        del number, frame
        self._signals += 1
        self._signal_all(signal.SIGTERM if self._signals == 1 else signal.SIGKILL)

    def _signal_all(self, number: int) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.send_signal(number)

    def _run_once(self, group: Sequence[LocalProcess]) -> Fate:
        self._processes = []
        readers = []
        try:
            for one in group:
                process = subprocess.Popen(
                    one.words, env=environment(one), stdin=subprocess.DEVNULL, text=True,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, errors="replace", bufsize=1,
                    start_new_session=True,
                    preexec_fn=functools.partial(_die_with_parent, os.getpid()),
                )  # fmt: skip
                self._processes.append(process)
                reader = threading.Thread(target=self._copy, args=(one.index, process), daemon=True)
                reader.start()
                readers.append(reader)
            if self._signals:  # one that came while they were being started
                self._signal_all(signal.SIGTERM)
            fate = self._wait()
        finally:
            self._signal_all(signal.SIGKILL)
            for process in self._processes:
                process.wait()
            for reader in readers:
                reader.join(timeout=5)
        return fate

    def _copy(self, index: int, process: subprocess.Popen[str]) -> None:
        assert process.stdout is not None
        for text in process.stdout:
            self._write(f"[{index}] {text.rstrip()}\n")

    def _say(self, text: str) -> None:
        self._write(f"[launch] {text}\n")

    def _write(self, text: str) -> None:
        """A reader that has gone must not stop the run: lines are lost, and still taken."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._out.write(text)
            self._out.flush()

    def _wait(self) -> Fate:
        """Until all have ended, by themselves or by us."""
        first: tuple[int, int] | None = None  # index and return code of who failed first
        deadline = float("inf")
        stop_seen = False
        while True:
            codes = [process.poll() for process in self._processes]
            now = time.monotonic()
            if self._signals and not stop_seen:
                stop_seen, deadline = True, now + self.grace_seconds
            if first is None:
                failed = [(i, code) for i, code in enumerate(codes) if code]
                if failed:
                    # One that was killed comes before those that it took along.
                    first = min(failed, key=lambda pair: (pair[1] >= 0, pair[0]))
                    saved = first[1] == PREEMPTED or stop_seen
                    wait = self.grace_seconds if saved else self.patience_seconds
                    deadline = min(deadline, now + wait)
            if None not in codes:
                return self._fate(first, stop_seen, killed=[])
            if now > deadline:
                late = [i for i, code in enumerate(codes) if code is None]
                self._signal_all(signal.SIGKILL)
                return self._fate(first, stop_seen, killed=late)
            time.sleep(_TICK)

    def _fate(self, first: tuple[int, int] | None, stopped: bool, killed: list[int]) -> Fate:
        which = ", ".join(str(index) for index in killed)
        if first is None:
            if not killed:
                return Fate(status=0, stopped=stopped)
            message = f"process {which} did not end within {self.grace_seconds:g} s: killed"
            return Fate(status=128 + signal.SIGKILL, message=message, stopped=stopped)
        index, code = first
        status = code if code > 0 else 128 - code
        message = f"process {index} {_how(code)}"
        if killed:
            message += f"; process {which} was still running and was killed"
        return Fate(status=status, message=message, stopped=stopped)


def _how(code: int) -> str:
    if code == PREEMPTED:
        return "saved on SIGTERM and ended (status 143)"
    if code > 0:
        return f"died with status {code}"
    return f"died by {signal.Signals(-code).name}"


def _die_with_parent(parent: int) -> None:
    """Linux: nobody trains on after the launcher was killed, beside the next launch."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it died before the call
            os.kill(os.getpid(), signal.SIGKILL)
