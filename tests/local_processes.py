"""Commands as real processes on this machine, by the launcher."""

import os
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
DEVICES = 8  # of all processes together


def start(module, *flags, processes, config=None, workdir=None, devices=DEVICES):
    """`python -m launch local ... -- module flags`, whose output is to be read."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {
        "PYTHONPATH": path,
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
    }
    given = {"config": config, "workdir": workdir}
    words = [
        sys.executable, "-m", "launch", "local", f"--processes={processes}",
        f"--devices_per_process={devices // processes}",
        *(f"--{name}={value}" for name, value in given.items() if value is not None),
        "--grace_seconds=60", "--save_seconds=30", "--execute", "--", module, *map(str, flags),
    ]  # fmt: skip
    return subprocess.Popen(
        words, cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run(module, *flags, **options):
    """The same to its end, which must be a good one; returns what it said."""
    process = start(module, *flags, **options)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said[-8000:]
    return said
