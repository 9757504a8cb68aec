"""What happens to a job, drawn from a seed, so that any schedule can be run again."""

import dataclasses
import errno
import os
import pathlib
import random
import signal
from typing import Literal

Kind = Literal["kill", "kill at a change", "term", "errno", "limit", "cut", "no marker", "changed"]
LIMITS = (2**10, 2**13, 2**16)  # bytes; a checkpoint's arrays are longer than any


@dataclasses.dataclass(frozen=True)
class Measured:
    """What an uninterrupted run of a job took.

    Attributes:
      seconds: from start to end.
      changes: of files below its folder, that Python code made.
    """

    seconds: float
    changes: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fault:
    """One thing that goes wrong.

    Attributes:
      kind: what.
      share: of the uninterrupted run's seconds, after which a signal comes.
      change: number of the change of a file at which it happens.
      number: of the error; of a limit, the bytes that a file may have.
      victim: which process it happens to.
    """

    kind: Kind
    share: float = 0.0
    change: int = 0
    number: int = 0
    victim: int = 0

    def __str__(self) -> str:
        if self.kind in ("kill", "term"):
            return f"{self.kind} process {self.victim} after {self.share:.0%}"
        if self.kind == "kill at a change":
            return f"kill process {self.victim} at change {self.change}"
        if self.kind == "errno":
            return f"{errno.errorcode[self.number]} from change {self.change} on"
        if self.kind == "limit":
            return f"EFBIG beyond {self.number} bytes"
        return self.kind

    def inside(self, folder: pathlib.Path) -> str:
        """CHAOS_FAULT of the process; "" where it comes from outside."""
        if self.kind == "kill at a change":
            return f"kill:{self.change}:{folder}"
        if self.kind == "limit":
            return f"limit:{self.number}:{folder}"
        return f"{self.number}:{self.change}:{folder}" if self.kind == "errno" else ""

    @property
    def signal(self) -> int:
        """The signal from outside; 0 where there is none."""
        return {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(self.kind, 0)


def draw(seed: str, measured: Measured, *, checkpoints: bool, processes: int) -> list[Fault]:
    """Three to five faults, most of them kills; each comes after a restart by the same command."""
    rng = random.Random(seed)
    kinds: list[Kind] = ["kill", "kill at a change", "kill at a change", "term", "errno", "limit"]
    if checkpoints:
        kinds += ["cut", "no marker"]
    found = []
    for _ in range(rng.randint(3, 5)):
        kind = rng.choice(kinds)
        numbers = LIMITS if kind == "limit" else [errno.ENOSPC, errno.EROFS, errno.EACCES]
        found.append(Fault(
            kind=kind, share=rng.random(), change=rng.randrange(measured.changes),
            number=rng.choice(numbers), victim=rng.randrange(processes),
        ))  # fmt: skip
    if rng.random() < 0.3:
        found.append(Fault(kind="changed"))
    return found


def damage_newest(workdir: pathlib.Path, kind: Kind) -> str:
    """Cuts the newest checkpoint short, or takes its marker away; says what it did.

    One that has no older one beside it stays: without it nothing could go on.
    """
    steps = sorted(
        (path for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()),
        key=lambda path: int(path.name),
    )
    if len(steps) < 2:
        return ""
    if kind == "no marker":
        for marker in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            (steps[-1] / marker).unlink(missing_ok=True)
        return f"took the marker of step {steps[-1].name}"
    files = [path for path in steps[-1].rglob("*") if path.is_file() and path.parent.name == "d"]
    if not files:
        return ""
    largest = max(files, key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return f"cut a file of step {steps[-1].name} in half"
