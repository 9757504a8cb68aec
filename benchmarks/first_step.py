"""Seconds from a training command to its first finished step, without and with compiled programs.

    python -m benchmarks.first_step [--size=mini] [--rounds=3]

The command is `python -m vlv_jax.train --config configs/vlv_stage1.py:mini`, told to make one
step, on the smallest build of the miniature world. "cold" starts with an empty compilation cache,
"warm" with the one that a cold run filled (JAX_COMPILATION_CACHE_DIR). The step's time is read
from the run's metrics.jsonl, the end of the preparations from run.json. There is no peer.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks.alternate import (
    OURS,
    RESULTS,
    report,
    write_result,
)
from benchmarks.provenance import ROOT, busy_cores, provenance
from benchmarks.timing import summarize

COLD, WARM = "cold", "warm"
CONFIG = "configs/vlv_stage1.py:mini"


def train_command(world: pathlib.Path, workdir: pathlib.Path, extra: list[str]) -> list[str]:
    """The training command, for one step."""
    return [
        sys.executable, "-m", "vlv_jax.train", "--config", CONFIG, "--workdir", str(workdir),
        f"--config.data.source.path={world}", "--config.run.steps=1",
        "--config.optimizer.warmup_steps=0",
        "--config.run.log_every=1", "--config.run.sample_every=0", *extra,
    ]  # fmt: skip


def run_once(command: list[str], workdir: pathlib.Path, cache: pathlib.Path) -> dict[str, float]:
    """Seconds from the command to: everything loaded, the first step, the end.

    Raises:
      SystemExit: the command failed; with the end of what it said.
    """
    environment = os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"), "HF_HUB_OFFLINE": "1",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        # By default programs that compiled within a second are not kept.
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }  # fmt: skip
    began = time.time()
    done = subprocess.run(
        command, cwd=ROOT, env=environment, check=False, capture_output=True, text=True
    )
    ended = time.time()
    if done.returncode:
        raise SystemExit(f"error: training failed:\n{(done.stdout + done.stderr)[-4000:]}")
    return {**read_times(workdir, began), "end": ended - began}


def read_times(workdir: pathlib.Path, began: float) -> dict[str, float]:
    """What a run of one step wrote, in seconds since `began` (Unix time)."""
    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    first = next(line for line in lines if line["step"] == 1 and "loss" in line)
    return {
        "loaded": (workdir / "run.json").stat().st_mtime - began,
        "first step": first["time"] - began,
    }


def measure(rounds: int, size: str, extra: list[str]) -> dict[str, list[dict[str, float]]]:
    """Cold and warm runs in turn, each pair with a cache of its own."""
    found: dict[str, list[dict[str, float]]] = {COLD: [], WARM: []}
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        folder = pathlib.Path(scratch)
        world = _build_world(folder)
        if size == "tiny":
            extra = ["--config.data.batch_size=8", "--config.model.num_queries=8", *extra]
        for number in range(rounds):
            for kind in (COLD, WARM):
                print(f"[{kind}, round {number + 1} of {rounds}]", file=sys.stderr, flush=True)
                workdir = folder / f"{kind}{number}"
                command = train_command(world, workdir, extra)
                found[kind].append(run_once(command, workdir, folder / f"cache{number}"))
    return found


def _build_world(folder: pathlib.Path) -> pathlib.Path:
    """The data set that is trained on; returns the folder that a config names."""
    command = [sys.executable, "-m", "miniature.build", "--data_dir", str(folder)]
    subprocess.run([*command, "--builder", "smoke"], cwd=ROOT, check=True, capture_output=True)
    return next((folder / "miniature_world" / "smoke").glob("[0-9]*"))


def summary(
    found: dict[str, list[dict[str, float]]], size: str, command: str, busy: list[Any]
) -> dict[str, Any]:
    """The result in the form that every benchmark has."""
    measures = {
        f"{kind}: {stage}": {OURS: summarize([[run[stage]] for run in runs])}
        for kind, runs in found.items()
        for stage in runs[0]
    }
    return {
        "name": f"first-step-{size}",
        "peer": None,
        "peer_unavailable": None,
        "options": {"size": size, "rounds": len(found[COLD])},
        "facts": {"config": CONFIG},
        "peer_facts": {},
        "measures": measures,
        "differences": {},
        "busy_cores": busy,
        "provenance": provenance(command),
    }


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_step", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--size", choices=("tiny", "mini"), default="mini")
    parser.add_argument("--rounds", type=int, default=3, help="cold and warm runs each")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS / "cpu")
    arguments, extra = parser.parse_known_args(argv)  # the rest is for the training command
    if unknown := [x for x in extra if not x.startswith("--config.")]:
        parser.error(f"unknown arguments {unknown}; only --config.* is passed on to the training")
    before = busy_cores()
    found = measure(arguments.rounds, arguments.size, extra)
    options = [f"--size={arguments.size}", f"--rounds={arguments.rounds}", *extra]
    command = " ".join(["python -m benchmarks.first_step", *options])
    result = summary(found, arguments.size, command, [before, busy_cores()])
    report(result)
    print(f"written to {write_result(result, arguments.results)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
