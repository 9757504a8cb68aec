"""What jobs that go on with an output share: the note of its settings, and the parts of processes.

The note lies beside the output, in `<output>.settings.json`. Messages are the job's own, which
knows the remedy.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from core_jax.files import write_whole


def settings_file(output: pathlib.Path) -> pathlib.Path:
    """Where the note lies."""
    return output.with_name(f"{output.name}.settings.json")


def read_settings(output: pathlib.Path) -> dict[str, Any] | None:
    """What is noted; None without a note.

    Raises:
      ValueError: the note is no JSON object.
    """
    file = settings_file(output)
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:  # also where another process is just moving it
        return None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is no JSON object")
    return found


def write_settings(output: pathlib.Path, settings: Mapping[str, Any]) -> None:
    """Notes settings, as JSON; in the place of an older note, if there is one."""
    write_whole(settings_file(output), json.dumps(dict(settings), indent=1) + "\n")


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """For a message, every setting that is not what it was; empty if all are."""
    return "; ".join(
        f"{name} was {old.get(name)!r:.20}, is {value!r:.20}"
        for name, value in new.items()
        if old.get(name) != value
    )


def shard_path(output: pathlib.Path, index: int, count: int) -> pathlib.Path:
    """Where one of `count` processes writes: the output itself, or a numbered file beside it."""
    if count == 1:
        return output
    return output.with_name(f"{output.stem}-{index:05d}-of-{count:05d}{output.suffix}")
