"""Which examples a run skipped, in its directory: `bad-process0.jsonl`, one file a process."""

import json
import logging
import os
from collections.abc import Mapping
from typing import Any, Protocol

import jax
from etils import epath

from core_jax.files import write_whole

logger = logging.getLogger(__name__)


class BadExamples(Protocol):
    """The attribute `bad` of a batch iterator that replaces examples; a `BadLog` is one.

    Attributes:
        ids: {id: reason} of different examples, as far as they are kept.
    """

    ids: Mapping[str, Any]

    @property
    def fraction(self) -> float:
        """Of the positions that met an example that cannot be used."""
        ...


class SkippedList:
    """Lines `{"id": "000001", "reason": "truncated"}`, each example once, over all resumptions.

    The file is replaced whole, so that a killed process leaves no half of it, and only when there
    is something new: a run without bad examples has none. A resumed run adds to what it finds. A
    disk that fails is warned about and does not stop training.
    """

    def __init__(self, workdir: str | os.PathLike[str]) -> None:
        self.path = epath.Path(workdir) / f"bad-process{jax.process_index()}.jsonl"
        self._bad: BadExamples | None = None
        self._reasons: dict[str, str] = {}
        self._taken = 0

    def watch(self, batches: Any) -> None:
        """Reads what is listed already; `batches` has the attribute `bad`, or nothing is listed."""
        self._bad = getattr(batches, "bad", None)
        if self._bad is not None:
            self._reasons = _read(self.path)

    def metrics(self) -> dict[str, float]:
        """`bad_fraction` of this process since it started (prefetched batches included)."""
        return {} if self._bad is None else {"bad_fraction": self._bad.fraction}

    def write(self) -> None:
        """Writes the list if it has grown."""
        if self._bad is None or len(self._bad.ids) == self._taken:
            return
        found = dict(self._bad.ids)  # a copy: the loader's thread goes on adding
        new = {key: str(reason) for key, reason in found.items() if key not in self._reasons}
        reasons = self._reasons | new
        try:
            if new:
                _write(self.path, reasons)
        except Exception as error:
            logger.warning("%s cannot be written: %s", self.path, error)
            return
        self._reasons, self._taken = reasons, len(found)


def _read(path: epath.Path) -> dict[str, str]:
    try:
        lines = path.read_text().splitlines() if path.exists() else []
    except (OSError, ValueError) as error:  # a list must not stop a run
        logger.warning("%s cannot be read, and begins anew: %s", path, error)
        return {}
    reasons = {}
    for text in lines:
        try:
            line = json.loads(text)
            reasons[line["id"]] = line["reason"]
        except (ValueError, KeyError, TypeError):  # not written here
            continue
    return reasons


def _write(path: epath.Path, reasons: Mapping[str, str]) -> None:
    lines = [json.dumps({"id": key, "reason": reason}) for key, reason in reasons.items()]
    text = "\n".join(lines) + "\n"
    if "://" in os.fspath(path):
        path.write_text(text)  # object stores know no halves
    else:
        write_whole(path, text)
