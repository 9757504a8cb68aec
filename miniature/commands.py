"""Running the project's public commands, each in a process of its own, as a user would."""

import os
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

_GIGABYTE = 1 << 30
GLIBC_TUNABLES = ":".join((
    "glibc.malloc.hugetlb=1",
    f"glibc.malloc.mmap_threshold={2 * _GIGABYTE - 1}",
    f"glibc.malloc.trim_threshold={8 * _GIGABYTE}",
    f"glibc.malloc.top_pad={200 << 20}",
))  # fmt: skip


def run(module: str, *, config_values: Mapping[str, Any] | None = None, **options: Any) -> None:
    """Prints and runs `python -m MODULE --option=value ... --config.name=value ...`.

    Raises:
      SystemExit: the command failed; what it printed says why.
    """
    words = [f"--{name}={value}" for name, value in options.items()]
    words += [f"--config.{name}={value}" for name, value in (config_values or {}).items()]
    run_words(module, words)


def run_words(module: str, words: Sequence[str]) -> None:
    """The same with the command line as it is, for options that take several words.

    Raises:
      SystemExit: the command failed; what it printed says why.
    """
    print(f"\n$ python -m {module} {shlex.join(words)}", flush=True)
    done = subprocess.run([sys.executable, "-m", module, *words], check=False)
    if done.returncode:
        sys.exit(f"{module} ended with status {done.returncode}")


def world_path(root: pathlib.Path, builder: str) -> pathlib.Path:
    """Where `python -m miniature.build --data_dir=ROOT --builder=BUILDER` puts the data set."""
    return root / "miniature_world" / builder / "1.0.0"


def keep_compiled_programs(root: pathlib.Path) -> None:
    """Lets all commands that follow share what XLA has compiled: most of them compile the same.

    The user's own JAX_COMPILATION_CACHE_DIR stays.
    """
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


def keep_memory() -> None:
    """Lets the commands that follow keep freed memory, in huge pages, instead of returning it.

    XLA allocates a step's buffers anew in each step; on a CPU, glibc maps and clears them page by
    page, which took 40 % of a training step (docs/decisions/0004). Only glibc reads this; the
    user's own GLIBC_TUNABLES stay.
    """
    os.environ.setdefault("GLIBC_TUNABLES", GLIBC_TUNABLES)
