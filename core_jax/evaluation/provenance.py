"""What a reader needs to repeat a measurement: the command and the commit it ran from."""

import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any


def command_facts() -> dict[str, Any]:
    """The command that is running, and the commit of the checkout it runs from."""
    words = ["python", *sys.orig_argv[1:]]
    return {"command": from_here(shlex.join(words)), "commit": commit()}


def commit() -> str:
    """Hash of the checkout that this package lies in; empty where it is installed without one."""
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return ""

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return ""


def from_here(value: Any) -> Any:
    """Paths below the current directory as they read from it: reports are read elsewhere too."""
    if isinstance(value, str):
        return value.replace(os.getcwd() + os.sep, "")
    if isinstance(value, Mapping):
        return {key: from_here(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [from_here(item) for item in value]
    return value
