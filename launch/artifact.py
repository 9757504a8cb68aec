"""What a target makes of a request: text for people, and the steps that carry it out."""

import dataclasses
from collections.abc import Iterable
from typing import Literal

from launch.shell import line


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step:
    """One command that `--execute` runs.

    Attributes:
      words: the command.
      stdin: text that it reads; None: nothing.
      secret_stdin: names of variables whose "NAME=value" lines it reads instead: their values
        are in no text and on no command line.
    """

    words: tuple[str, ...]
    stdin: str | None = None
    secret_stdin: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Artifact:
    """A launch, as text and as steps.

    Attributes:
      kind: what the text is.
      text: what is printed; it does what the steps do.
      steps: what `--execute` runs, until one fails.
    """

    kind: Literal["shell", "yaml"]
    text: str
    steps: tuple[Step, ...]


def script(text: str) -> Artifact:
    """A bash script that is printed or run as it is."""
    # Not by standard input: ssh inside it would read the rest of the script.
    return Artifact(kind="shell", text=text, steps=(Step(words=("bash", "-c", text)),))


def commands(lines: Iterable[str]) -> Artifact:
    """A bash script of lines that stops at the first that fails."""
    return script("\n".join(["#!/usr/bin/env bash", "set -euo pipefail", *lines]) + "\n")


def in_turn(*words: tuple[str, ...]) -> Artifact:
    """The same of commands that are words, each quoted."""
    return commands(line(*command) for command in words)
