"""Names the process of a run that hangs or has died, in place of waiting for it for ever.

A process that is alive but stuck (in its loader, on a dead mount) is not noticed by
`jax.distributed`: the others wait for it in a collective. Here every process says in a file below
the working directory, every few seconds, that it lives and where it is. One that has not come
further for the set time looks who is behind, says so, and ends; so do all the others at that
moment. The one that hangs leaves its stack, in its own log and for the others.

Processes that share work without waiting for each other (caching, captioning, distillation) are
watched each by itself: the one that hangs says so and ends.

Files, not the coordination service: they are readable when process 0 is the one that has died.
"""

import contextlib
import dataclasses
import faulthandler
import json
import os
import pathlib
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from core_jax.distributed import host_names
from core_jax.files import write_whole

HEARTBEATS = "heartbeats"  # name of the folder, beside what a run makes
HUNG = 75  # "try again later": the same command goes on from the newest checkpoint
_LONGEST_INTERVAL = 5.0
_STACK_SHOWN = 6000
_BEFORE = -1_000_000  # more moves than any watchdog that another follows will make


@dataclasses.dataclass
class _Peer:
    """What was seen of a process.

    Attributes:
      told: its file's content; empty: it has not begun.
      alive_at: when its file last changed, by the watching process's clock.
    """

    told: Mapping[str, Any]
    alive_at: float


class Watchdog:
    """Watches the processes of a run; a context manager.

    Args:
      folder: of the heartbeats, shared by all processes; it is removed at the end.
      seconds: that a process may stay at one place; longer than the longest compilation, save and
        evaluation. 0 watches nothing.
      index: of this process.
      peers: processes that go in step with this one, which may be among them; none: it is watched
        by itself.
      end: called with the message where something hangs; it does not return.
      place: where the main thread is at first.
      before_others: another watchdog of the same folder follows this one in every process; who is
        in this one is behind whoever is in that one.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        seconds: float,
        index: int = 0,
        peers: Iterable[int] = (),
        end: Callable[[str], None] | None = None,
        place: str = "the start",
        before_others: bool = False,
    ) -> None:
        self.seconds, self.index = seconds, index
        self.watched = sorted({index, *peers})
        self.interval = min(seconds / 10, _LONGEST_INTERVAL)
        self._folder = pathlib.Path(folder)
        self._end = _end if end is None else end
        self._place, self._moves = place, _BEFORE if before_others else 0
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._stack: TextIO | None = None
        self._made: list[pathlib.Path] = []
        self._peers: dict[int, _Peer] = {}

    def __enter__(self) -> "Watchdog":
        if self.seconds <= 0:
            return self
        with contextlib.suppress(OSError):  # a full disk must not end what it does not concern
            self._made = [folder for folder in self._folder.parents if not folder.exists()]
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stack = self._stack_file(self.index).open("w")
        now = time.monotonic()
        self._peers = {i: _Peer(self._read(i), now) for i in self.watched}
        self._beat(0)
        self._thread = threading.Thread(target=self._watch, daemon=True, name="watchdog")
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._thread is None:
            return
        if kind is not None and issubclass(kind, Exception) and len(self.watched) > 1:
            self._say_who_is_silent()  # this one is heard of meanwhile
        self._stop.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._stack is not None:
            self._stack.close()
        with contextlib.suppress(OSError):
            for file in (self._file(self.index), self._stack_file(self.index)):
                file.unlink(missing_ok=True)
            self._folder.rmdir()  # by whoever ends last
            if kind is not None:  # a job that is refused leaves nothing
                for folder in self._made:
                    folder.rmdir()

    def at(self, place: str) -> None:
        """The main thread says where it is; all processes say the same in the same order."""
        self._place, self._moves = place, self._moves + 1

    def _file(self, index: int) -> pathlib.Path:
        return self._folder / f"process-{index}.json"

    def _stack_file(self, index: int) -> pathlib.Path:
        return self._folder / f"process-{index}.stack.txt"

    def _read(self, index: int) -> dict[str, Any]:
        try:
            return json.loads(self._file(index).read_text())
        except (OSError, ValueError):
            return {}

    def _beat(self, number: int) -> None:
        told = {"pid": os.getpid(), "beat": number, **self._own()}
        with contextlib.suppress(OSError):
            write_whole(self._file(self.index), json.dumps(told), sync=False)

    def _own(self) -> dict[str, Any]:
        return {"host": socket.gethostname(), "moves": self._moves, "place": self._place}

    def _look(self) -> None:
        """Reads what the others say."""
        for index, peer in self._peers.items():
            told = self._read(index)
            if told and told != peer.told:
                self._peers[index] = _Peer(told, time.monotonic())

    def _watch(self) -> None:
        beat, moves, moved_at = 0, None, time.monotonic()
        while not self._stop.wait(self.interval):
            beat += 1
            self._beat(beat)
            self._look()
            if self._moves != moves:
                moves, moved_at = self._moves, time.monotonic()
                if self._stack is not None:  # it needs no lock of Python's, which C code may hold
                    faulthandler.dump_traceback_later(self.seconds, file=self._stack)
            elif time.monotonic() - moved_at >= self.seconds:
                self._verdict(beat, moves)
                if self._moves == moves:
                    return

    def _verdict(self, beat: int, moves: int | None) -> None:
        """Says who is behind, and ends, unless things move again meanwhile."""
        self._dump_stack()
        for _ in range(2):  # the others come to their verdict, and leave their stacks
            time.sleep(self.interval)
            beat += 1
            self._beat(beat)
            self._look()
        if self._moves != moves or self._stop.is_set():
            return
        text = self.verdict()
        sys.stderr.write(f"\n{text}\n")
        sys.stderr.flush()
        # All have this moment to say the same: who ends first takes the others along, and process
        # 0, which jax's coordination service lives in, aborts them at once: it ends last. What
        # was said holds: the error that another's end raises here must not keep this one waiting.
        time.sleep((2 if self.index else 4) * self.interval)
        self._end(text)

    def verdict(self) -> str:
        """Who is behind, where, and with which stack."""
        told = {i: peer.told for i, peer in self._peers.items()}
        told[self.index] = self._own()  # its file may be missing, on a full disk
        hosts = {i: str(entry.get("host", "never seen")) for i, entry in told.items()}
        head = f"nothing has moved for {self.seconds:g} s"
        ends = "All end" if len(self.watched) > 1 else "It ends"
        tail = f"{ends}; the same command goes on from what is whole."
        if silent := self._silent():
            return f"{head}: {host_names(silent, hosts)} {_gives(silent)} no sign of life. {tail}"
        moves = {i: int(entry.get("moves", 2 * _BEFORE)) for i, entry in told.items()}
        behind = [i for i in self.watched if moves[i] == min(moves.values())]
        place = told[behind[0]].get("place", "the start")
        if len(behind) == len(self.watched) > 1:
            return f"{head}: all {len(behind)} processes are at {place}. {tail}"
        text = f"{head}: {host_names(behind, hosts)} {_hangs(behind)} at {place}. {tail}"
        return text + self._stack_of(behind[0])

    def _silent(self) -> list[int]:
        since = max(0.5 * self.seconds, 3 * self.interval)
        now = time.monotonic()
        return [i for i, p in self._peers.items() if i != self.index and now - p.alive_at > since]

    def _say_who_is_silent(self) -> None:
        """After an error that another process's death may be the cause of."""
        self.at("its end, after an error")
        before = {i: peer.told for i, peer in self._peers.items()}
        time.sleep(3 * self.interval)
        self._look()
        quiet = [i for i, p in self._peers.items() if i != self.index and p.told == before[i]]
        if quiet:
            hosts = {i: str(peer.told.get("host", "?")) for i, peer in self._peers.items()}
            text = f"{host_names(quiet, hosts)} {_gives(quiet)} no sign of life: look there first"
            print(text, file=sys.stderr, flush=True)

    def _dump_stack(self) -> None:
        faulthandler.cancel_dump_traceback_later()
        if self._stack is None:
            return
        if self._stack_file(self.index).stat().st_size == 0:
            faulthandler.dump_traceback(file=self._stack)
            self._stack.flush()
        sys.stderr.write(self._stack_of(self.index))
        sys.stderr.flush()

    def _stack_of(self, index: int) -> str:
        with contextlib.suppress(OSError):
            if text := self._stack_file(index).read_text(errors="replace"):
                return f"\nThe stack of process {index}:\n{text[:_STACK_SHOWN]}"
        return ""


def _gives(indices: list[int]) -> str:
    return "gives" if len(indices) == 1 else "give"


def _hangs(indices: list[int]) -> str:
    return "hangs" if len(indices) == 1 else "hang"


def _end(text: str) -> None:
    """The main thread cannot be interrupted where it is."""
    del text
    sys.stdout.flush()
    os._exit(HUNG)
