"""Which examples a run could not use: counted, listed in its directory, and said in its log."""

import collections
import json
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from core_jax.files import write_whole

logger = logging.getLogger(__name__)

FOLDER = "unusable"


class UnusableExamples:
    """{id: reason} of one process, in a file that grows over all starts of a run.

    Args:
      workdir: of the run.
      process_index: whose file.
    """

    def __init__(self, workdir: str, process_index: int) -> None:
        self._file = epath.Path(workdir) / FOLDER / f"process-{process_index}.json"
        self.ids: dict[str, str] = {}
        if self._file.exists():
            self.ids = json.loads(self._file.read_text())

    def update(self, batches: Iterator[Any]) -> None:
        """Takes what batches have met so far, if they tell it, as those of `make_batches` do."""
        log = getattr(batches, "bad", None)
        if log is None or all(key in self.ids for key in log.ids.copy()):
            return
        self._add({key: str(reason) for key, reason in log.ids.copy().items()})

    def _add(self, ids: Mapping[str, str]) -> None:
        self.ids = {**self.ids, **ids}
        try:
            self._write(json.dumps(self.ids, indent=1) + "\n")
        except OSError as error:  # a list that cannot be written must not stop a run
            logger.warning("%s was not written: %s", self._file, error)
        reasons = collections.Counter(self.ids.values()).most_common()
        logger.warning(
            "%d examples could not be used and were replaced (%s); %s lists them",
            len(self.ids), ", ".join(f"{reason} {n}" for reason, n in reasons), self._file,
        )  # fmt: skip

    def _write(self, text: str) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        if "://" in os.fspath(self._file):
            self._file.write_text(text)
        else:
            write_whole(self._file, text)
