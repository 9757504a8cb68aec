"""Where a number comes from: command, commit, versions, machine."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
_PACKAGES = (
    "jax", "jaxlib", "flax", "numpy", "pillow", "torch", "transformers", "diffusers",
)  # fmt: skip
# What changes times without being an argument.
_VARIABLES = ("XLA_FLAGS", "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "JAX_PLATFORMS")


def provenance(command: str) -> dict[str, Any]:
    """What to write beside a result.

    Args:
      command: what a person types to get it again.
    """
    return {
        "command": command,
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "versions": versions(),
        "cpu": cpu_name(),
        "cpus": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "environment": {n: os.environ[n] for n in _VARIABLES if n in os.environ},
    }


def commit() -> str:
    """The checkout's commit, with "+changes" where tracked files differ; "unknown" without git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        # Results and figures change while a series of benchmarks is run.
        tracked = ("--untracked-files=no", "--", ".", ":!benchmarks/results", ":!docs")
        changed = git("status", "--porcelain", *tracked)
        return git("rev-parse", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter here, as far as installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    """The processor's name as Linux tells it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def busy_cores(seconds: float = 0.2) -> float | None:
    """Cores that others keep busy while this waits; None where the system does not say.

    The load average would still tell of the benchmark that ran a minute ago.
    """
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    if before is None or after is None or after[1] == before[1]:
        return None
    idle = (after[0] - before[0]) / (after[1] - before[1])
    return round((1 - idle) * (os.cpu_count() or 1), 2)


def _ticks() -> tuple[int, int] | None:
    """(idle, all) of Linux's clock, over all cores."""
    try:
        first = pathlib.Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    ticks = [int(x) for x in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)
