"""Starting a job's processes through the server, sending them signals, waiting for their end."""

import dataclasses
import itertools
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

from launch.local import free_port

ROOT = pathlib.Path(__file__).parents[2]
_NOT_PASSED = ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES", "JAX_COORDINATOR_ADDRESS")


def environment(scratch: pathlib.Path) -> dict[str, str]:
    """Of the server and its children: one compilation cache, so that a restart compiles nothing."""
    base = {k: v for k, v in os.environ.items() if k not in _NOT_PASSED}
    return base | {
        "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0", "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip


@dataclasses.dataclass
class Running:
    """Processes of one start.

    Attributes:
      pids: by index.
      log: what they said.
      began: on the monotonic clock.
    """

    server: "Server"
    keys: list[str]
    pids: list[int]
    log: pathlib.Path
    began: float

    def statuses(self) -> list[int | None]:
        return [self.server.status.get(key) for key in self.keys]

    def send(self, number: int, index: int) -> bool:
        """Sends a signal; False if that process has ended already."""
        self.server.pump(0)
        if self.statuses()[index] is not None:
            return False
        os.kill(self.pids[index], number)
        return True

    def wait(self, seconds: float, *, patience: float = 30.0) -> list[int]:
        """Until all have ended; after the first failure the others get `patience`, as launched."""
        deadline = time.monotonic() + seconds
        while None in self.statuses():
            self.server.pump(0.05)
            if any(self.statuses()):
                deadline = min(deadline, time.monotonic() + patience)
                patience = float("inf")
            if time.monotonic() > deadline:
                for index in range(len(self.keys)):
                    self.send(signal.SIGKILL, index)
                deadline = float("inf")
        return [int(status or 0) for status in self.statuses()]


class Server:
    """The other side of `tests.chaos.server`; a context manager."""

    def __init__(self, scratch: pathlib.Path) -> None:
        self.scratch, self.status = scratch, {}
        self._pids: dict[str, int] = {}
        self._numbers = itertools.count()
        scratch.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.server"], cwd=ROOT, env=environment(scratch),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            stderr=(scratch / "server.log").open("w"),
        )  # fmt: skip
        self._answers: queue.Queue[dict] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if not self._answers.get(timeout=300).get("ready"):
            raise RuntimeError(f"the server did not start, see {scratch}/server.log")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _read(self) -> None:
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put({})

    def pump(self, seconds: float) -> None:
        """Takes what the server has said, waiting for at most this long."""
        try:
            answer = self._answers.get(timeout=seconds) if seconds else self._answers.get_nowait()
        except queue.Empty:
            return
        if not answer:
            raise RuntimeError(f"the server has ended, see {self.scratch}/server.log")
        if "pid" in answer:
            self._pids[answer["key"]] = answer["pid"]
        else:
            self.status[answer["key"]] = answer["status"]

    def start(
        self, words: Sequence[str], log: pathlib.Path, *, processes: int = 1, fault: str = "",
        victim: int = 0, count: bool = False,
    ) -> Running:  # fmt: skip
        """Starts `[module, flag, ...]`; process `victim` has `fault` in it."""
        keys, port = [], free_port()
        log.write_text("")
        for index in range(processes):
            env = {"JAX_NUM_PROCESSES": "1"}
            if processes > 1:
                env = {
                    "JAX_NUM_PROCESSES": str(processes), "JAX_PROCESS_ID": str(index),
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                }  # fmt: skip
            if fault and index == victim:
                env["CHAOS_FAULT"] = fault
            if count:
                env["CHAOS_COUNT"] = "1"
            keys.append(str(next(self._numbers)))
            request = {"key": keys[-1], "words": list(words), "env": env, "log": str(log)}
            self._process.stdin.write(json.dumps(request) + "\n")
        while not all(key in self._pids for key in keys):
            self.pump(1)
        return Running(self, keys, [self._pids[key] for key in keys], log, time.monotonic())
