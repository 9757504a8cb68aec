"""The windows that `massv_jax.generate` chose: written beside its answers, and replayed from there.

A line is a batch: {"ids": [...], "seconds": 1.2, "windows": [[[gamma, rounds], ...]],
"max_gamma": 8}. With windows chosen by measured speed a sampled answer follows from them beside its
seed, so the log is what makes such a run repeatable.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TextIO

from massv_jax.generating_files import JobError, Row
from massv_jax.speculative.adaptive import GammaChoice, Replay
from massv_jax.speculative.decoder import Answers


def open_log(path: pathlib.Path) -> TextIO:
    """For appending; a line that a kill has cut off goes."""
    if path.is_file():
        content = path.read_bytes()
        if (whole := content.rfind(b"\n") + 1) < len(content):
            os.truncate(path, whole)
    return path.open("a", encoding="utf-8")


def window_line(ids: Sequence[str], seconds: float, answers: Answers) -> str:
    """A batch's line, with its end."""
    return json.dumps({
        "ids": list(ids), "seconds": round(seconds, 4),
        "windows": answers.choices, "max_gamma": answers.max_gamma,
    }) + "\n"  # fmt: skip


@dataclasses.dataclass(frozen=True)
class LoggedWindows:
    """A log, as what an option `gamma` of a job may be.

    Attributes:
      batches: {ids of a batch: its windows}.
      digest: of the file, SHA-256 in hex.
    """

    batches: Mapping[tuple[str, ...], Replay]
    digest: str = ""

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "LoggedWindows":
        """From a file; a last line that was cut off by a kill is left out.

        Raises:
          JobError: there is none, or a line is not of this form.
        """
        path = pathlib.Path(path).expanduser()
        try:
            content = path.read_bytes()
        except OSError as error:
            raise JobError(f"--replay {path}: {error.strerror}") from error
        lines, batches = content.decode(errors="replace").split("\n"), {}
        for number, line in enumerate(lines[:-1], 1):
            try:
                ids, replay = _parse(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise JobError(
                    f"{path}, line {number}, is no line of windows ({error!r}); name the "
                    "<output>.windows.jsonl of an earlier run"
                ) from error
            batches[ids] = replay
        return cls(batches, hashlib.sha256(content).hexdigest())

    def split(
        self, rows: Sequence[Row], batch_size: int
    ) -> Iterator[tuple[list[Row], Replay | None]]:
        """Rows as they were batched, with their windows; None for those that had none.

        Rows without windows were errors: one that can be answered now is of another job.

        Raises:
          JobError: batches were larger.
        """
        by_id = {row.id: row for row in rows}
        largest = max(map(len, self.batches), default=0)
        if largest > batch_size:
            raise JobError(
                f"the logged batches have up to {largest} prompts; set --batch_size={largest}"
            )
        # Of a run that was killed a prompt may have two lines: its answer is the later one's.
        line_of = {i: ids for ids in self.batches for i in ids}
        for ids, replay in self.batches.items():
            if batch := [by_id.pop(i) for i in ids if i in by_id and line_of[i] == ids]:
                yield batch, replay
        for row in by_id.values():
            yield [row], None


def _parse(line: Mapping[str, object]) -> tuple[tuple[str, ...], Replay]:
    ids, windows = line["ids"], line["windows"]
    if not isinstance(ids, list) or not isinstance(windows, list):
        raise TypeError("ids and windows are lists")
    room = line.get("max_gamma", 0)
    if not isinstance(room, int):
        raise TypeError("max_gamma is a number")
    choices = tuple(tuple(GammaChoice(int(g), int(n)) for g, n in calls) for calls in windows)
    return tuple(str(i) for i in ids), Replay(choices, room)
