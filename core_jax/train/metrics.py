"""Where numbers go: TensorBoard events, JSON lines, a progress line. Process 0 only."""

import json
import logging
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TextIO

import jax
import numpy as np
from etils import epath

from core_jax.files import write_whole

logger = logging.getLogger(__name__)


class MetricWriter(Protocol):
    """What the loop and its hooks write to. Steps are numbers of updates made.

    A writer may also have `sync()`, which is called before a save: what a run that goes on from
    there will not write again is kept.
    """

    def start(self, step: int, total_steps: int) -> None:
        """Called once, before anything is written, with the step that training starts from."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars."""

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures, each uint8 [h, w, 3]."""

    def close(self) -> None:
        """Flushes and releases."""


class JsonlWriter:
    """One JSON object a line: `{"step": 20, "time": ..., "loss": ...}`; not-a-number is null.

    A resumed run goes through some steps again; `start` drops their old lines, so that every
    step is in the file once.
    """

    def __init__(self, path: str) -> None:
        self._path = epath.Path(path)
        self._file: Any = None

    def start(self, step: int, total_steps: int) -> None:
        """Opens the file and drops the lines past `step`."""
        del total_steps
        self._path.parent.mkdir(parents=True, exist_ok=True)
        kept = [line for line in self._lines() if line.get("step", 0) <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        if self._path.exists() and "://" not in os.fspath(self._path):
            write_whole(self._path, text)  # the lines of days, on a disk that may be full
        else:
            self._path.write_text(text)
        self._file = self._path.open("a")

    def _lines(self) -> list[dict[str, Any]]:
        if not self._path.exists():
            return []
        lines = []
        for text in self._path.read_text().splitlines():
            try:
                lines.append(json.loads(text))
            except json.JSONDecodeError:  # the half line of a killed run
                continue
        return lines

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Appends a line and flushes it."""
        values = {name: float(x) if math.isfinite(x) else None for name, x in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": round(time.time(), 3), **values}) + "\n")
        self._file.flush()

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Ignores pictures."""

    def sync(self) -> None:
        """Waits until all lines are on the disk."""
        if "://" not in os.fspath(self._path):  # there only closing puts a file in its place
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()


class TensorBoardWriter:
    """TensorBoard events by tensorboardX, which needs no TensorFlow."""

    def __init__(self, directory: str) -> None:
        self._directory = os.fspath(directory)
        self._writer: Any = None

    def start(self, step: int, total_steps: int) -> None:
        """Opens an event file; TensorBoard hides what older files have past `step`."""
        del total_steps
        from tensorboardX import SummaryWriter  # slow to import, and not needed by tools

        self._writer = SummaryWriter(self._directory, purge_step=step + 1 if step else None)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds scalars."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Adds pictures."""
        for name, image in images.items():
            self._writer.add_image(name, image, step, dataformats="HWC")

    def close(self) -> None:
        """Flushes the events."""
        if self._writer is not None:
            self._writer.close()


class ProgressWriter:
    """A line for people: step, share, loss, rate, what was skipped, time left.

    On a terminal it overwrites itself; elsewhere (a log file) every write is a line of its own.
    """

    def __init__(self, stream: TextIO | None = None, label: str = "train") -> None:
        self._stream = sys.stderr if stream is None else stream
        self._label = label
        self._is_tty = self._stream.isatty()
        self._total = 0
        self._width = 0

    def start(self, step: int, total_steps: int) -> None:
        """Notes the goal; says so if training goes on from a checkpoint."""
        self._total = total_steps
        if step:
            self._line(f"{self._label}: resumed at step {step} of {total_steps}", keep=True)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows a line if the metrics are those of training (they have a loss)."""
        if "loss" not in metrics:
            return
        parts = [f"{self._label}: step {step}/{self._total} {100 * step // max(self._total, 1):d}%"]
        parts.append(f"loss {metrics['loss']:.4g}")
        if rate := metrics.get("images_per_second"):
            parts.append(f"{rate:.3g} images/s")
        if bad := metrics.get("bad_fraction"):
            parts.append(f"{bad:.2%} skipped")
        if speed := metrics.get("steps_per_second"):
            parts.append(f"ETA {format_seconds((self._total - step) / speed)}")
        self._line("  ".join(parts), keep=step >= self._total)

    def _line(self, text: str, *, keep: bool) -> None:
        if not self._is_tty:
            print(text, file=self._stream, flush=True)
            return
        padding = " " * max(self._width - len(text), 0)
        print(f"\r{text}{padding}", end="\n" if keep else "", file=self._stream, flush=True)
        self._width = 0 if keep else len(text)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Ignores pictures."""

    def close(self) -> None:
        """Ends the line."""
        if self._is_tty and self._width:
            print(file=self._stream, flush=True)
            self._width = 0


class MultiWriter:
    """Writes to several writers; one that fails is warned about and, in the end, left out.

    Training must not stop because a disk with logs is full. After `max_failures` failures in a
    row a writer is dropped.
    """

    def __init__(self, writers: Sequence[MetricWriter], max_failures: int = 3) -> None:
        self._writers = list(writers)
        self._failures = [0] * len(self._writers)
        self._max_failures = max_failures

    def _each(self, method: str, *args: Any) -> None:
        for i, writer in enumerate(self._writers):
            optional = method == "sync" and not hasattr(writer, method)
            if optional or self._failures[i] >= self._max_failures:
                continue
            try:
                getattr(writer, method)(*args)
                if method != "sync":  # an old file that is kept says nothing of a new line
                    self._failures[i] = 0
            except Exception as error:
                self._failures[i] += 1
                # Without start there is nothing to write to.
                gone = method == "start" or self._failures[i] >= self._max_failures
                self._failures[i] = self._max_failures if gone else self._failures[i]
                logger.warning(
                    "%s.%s failed (%s: %s)%s",
                    type(writer).__name__,
                    method,
                    type(error).__name__,
                    error,
                    "; it is left out from now on" if gone else "",
                )

    def start(self, step: int, total_steps: int) -> None:
        """Starts every writer."""
        self._each("start", step, total_steps)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes scalars to every writer."""
        self._each("write", step, metrics)

    def write_images(self, step: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes pictures to every writer."""
        self._each("write_images", step, images)

    def sync(self) -> None:
        """Before a save: lines that a resumed run doesn't write again must survive with it."""
        self._each("sync")

    def close(self) -> None:
        """Closes every writer."""
        self._each("close")


def default_writers(workdir: str, *, label: str = "train") -> MultiWriter:
    """`metrics.jsonl`, `tensorboard/` and a progress line; nothing in processes but the first."""
    if jax.process_index():
        return MultiWriter([])
    root = epath.Path(workdir)
    return MultiWriter(
        [
            JsonlWriter(str(root / "metrics.jsonl")),
            TensorBoardWriter(str(root / "tensorboard")),
            ProgressWriter(label=label),
        ]
    )


def format_seconds(seconds: float) -> str:
    """`75 -> "1m15s"`, `7300 -> "2h01m"`."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
