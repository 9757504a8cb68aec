"""Where a number comes from: command, commit, versions, machine."""

import datetime
import importlib.metadata
import os
import pathlib
import platform
import subprocess
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


def load_average() -> float | None:
    """Processes that wanted a core in the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None
