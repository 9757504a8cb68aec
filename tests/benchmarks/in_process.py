"""Runs the sides of a benchmark in this process, at the tiny size."""

import json
import pathlib

from benchmarks import alternate


def run_tiny(benchmark: alternate.Benchmark, folder: pathlib.Path, *options: str) -> dict:
    """What would be written; times mean nothing."""
    argv = ["--size=tiny", "--rounds=1", "--repeats=1", "--threads=0", *options]

    def launch(side: str) -> dict:
        arguments = alternate.parse(benchmark, [*argv, f"--side={side}", f"--folder={folder}"])
        return json.loads(json.dumps(alternate.run_side(benchmark, arguments)))

    return alternate.drive(benchmark, alternate.parse(benchmark, argv), folder, launch, "command")
