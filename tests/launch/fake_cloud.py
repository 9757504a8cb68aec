"""A gcloud that answers from files, so that what a launch prints can be run to its end."""

import os
import pathlib
import subprocess
import sys

# Each question has a file of answers, a line each; the last one is repeated. "!..." fails.
GCLOUD = """\
#!{python}
import pathlib, sys
folder = pathlib.Path({folder!r})
asked = " ".join(sys.argv[1:])
with (folder / "asked").open("a") as log:
    log.write(asked.replace(chr(10), " ") + chr(10))
for file in sorted(folder.glob("*.answers")):
    pattern, *lines = file.read_text().splitlines()
    if all(part in asked for part in pattern.split("&")):
        file.write_text(chr(10).join([pattern, *(lines[1:] or lines)]))
        if lines[0].startswith("!"):
            sys.exit(lines[0].removeprefix("!").strip() or 1)
        print(lines[0].replace(" ", chr(10)))
        break
"""
GIT = '#!/bin/bash\nfor word; do case $word in --output=*) : >"${word#--output=}" ;; esac; done\n'


class FakeCloud:
    """A folder of programs that stand in for the cloud's."""

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self._tool("gcloud", GCLOUD.format(python=sys.executable, folder=str(folder)))
        self._tool("git", GIT)
        # It also ends a script that waits for ever.
        log = folder / "slept"
        ends = f'[ "$(wc -l <{log})" -lt 200 ] || kill "$PPID"'
        self._tool("sleep", f'#!/bin/bash\necho "$1" >>{log}\n{ends}\n')

    def _tool(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text)
        (self.folder / name).chmod(0o755)

    def answers(self, pattern: str, *lines: str) -> None:
        """What is answered where all `&`-separated parts are asked for; the first that fits."""
        number = len(list(self.folder.glob("*.answers")))
        text = "\n".join([pattern, *lines])
        (self.folder / f"{number:02d}.answers").write_text(text)

    def run(self, script: str, **env: str) -> subprocess.CompletedProcess[str]:
        """Runs what was printed."""
        return subprocess.run(
            ["bash", "-c", script], text=True, capture_output=True, check=False, timeout=120,
            env=os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}"} | env,
        )  # fmt: skip

    def asked(self, *parts: str) -> int:
        """How many commands had all of these in them."""
        lines = (self.folder / "asked").read_text().splitlines()
        return sum(all(part in line for part in parts) for line in lines)

    def slept(self) -> list[int]:
        """Seconds of each pause."""
        file = self.folder / "slept"
        return [int(line) for line in file.read_text().split()] if file.exists() else []
